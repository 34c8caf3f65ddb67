"""The float network: families, rewrites that keep its function, its traced program, what its layers cost."""
