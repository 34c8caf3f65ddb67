"""Observation of activations and weights, and the scales, pre-scales and bit widths that follow from it."""
