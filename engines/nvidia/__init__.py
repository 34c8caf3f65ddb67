"""TensorRT and TensorRT-RTX: builds in a child process, and the audit of an engine's layers."""
