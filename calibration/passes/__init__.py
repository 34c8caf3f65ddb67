"""Passes that compose with any recipe, one a file."""
