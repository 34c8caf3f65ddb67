"""Comparison of recipes on one model."""
