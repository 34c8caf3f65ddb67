"""Rewrites of an OpenVINO graph: looked-up scales as inputs, decomposed group norms."""
