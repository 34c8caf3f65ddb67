"""Evaluation against the float model: errors by step, agreement by layer, Frechet distance, report."""
