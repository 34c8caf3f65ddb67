"""Command line of edm-deploy: quantize, export, build, sample, evaluate, compare, benchmark."""
