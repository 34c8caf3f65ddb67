"""The hand: command line, demo, evaluation, benchmarks, reports."""
