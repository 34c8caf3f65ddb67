"""End-to-end distillation: the training loop, its losses, and the trained parameters."""
