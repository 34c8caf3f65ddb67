"""In-flight batching: samples of many requests share the engine's calls. A library without HTTP."""
