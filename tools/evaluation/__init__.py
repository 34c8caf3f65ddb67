"""Evaluation against the float model: error by step, agreement by layer, Frechet distance, report."""
