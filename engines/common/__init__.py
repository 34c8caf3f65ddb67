"""Shared by backends: their sources, vendor packages, precision, and the order of runs on a GPU."""
