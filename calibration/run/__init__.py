"""Infrastructure of a run: options, progress, checkpoints, time budget, signals, memory."""
