"""End-to-end distillation: the training loop, its losses, and what is trained."""
