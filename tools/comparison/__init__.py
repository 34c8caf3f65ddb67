"""Recipes side by side on one model."""
