"""Attention with 8-bit queries and keys: operands, launches, and the same arithmetic in plain torch. The kernels are in `cuda/attention.cuh`."""
