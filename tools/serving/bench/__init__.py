"""The benchmark of the server: mixed requests that arrive at random, against serving without in-flight batching."""
