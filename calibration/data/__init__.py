"""Inputs for calibration and training: sampling trajectories of the model, prompts, activation samples."""
