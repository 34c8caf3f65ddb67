"""Backends, one a file: how an ONNX directory becomes an engine, and how an engine is opened."""
