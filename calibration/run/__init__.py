"""A run and what surrounds it: options, checkpoints, time budget, Ctrl-C, memory."""
