"""Description of models, artifacts, ONNX directories and engines; published architectures, and random models of their sizes."""
