"""The float network: model families, rewrites that preserve its function, its traced program, the cost of its layers."""
