"""Benchmarks: engines, one fine-tuning step, kernels."""
