"""From an artifact to a Q/DQ ONNX directory: `trace` draws the float graph, `qdq` puts the codes and scale tables in, `onnx` writes it."""
