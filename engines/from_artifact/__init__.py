"""What the backends `cuda` and `cpu` share: the engine file of packed weights, and the session of a graph that is recorded."""
