"""From a float model to an artifact: trajectories, observers, training, recipes."""
