"""Observe activations and weights, and choose scales, pre-scales and bit widths from what was observed."""
