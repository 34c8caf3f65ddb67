"""Export an artifact to a Q/DQ ONNX directory: `trace` makes the float graph, `qdq` inserts codes and scale tables, `onnx` writes the directory."""
