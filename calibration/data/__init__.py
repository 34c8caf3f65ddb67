"""What models are calibrated and trained on: trajectories of the model's own, prompts, activation samples."""
