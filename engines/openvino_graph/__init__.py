"""Rewrites of an OpenVINO graph: scales as inputs, group norms split."""
