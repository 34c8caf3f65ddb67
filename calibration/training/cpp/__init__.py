"""Kernels of a training on a CPU, in C++: each reads and writes a tensor once, where torch's operators do so several times."""
