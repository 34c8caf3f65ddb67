"""Expected times of layers on GPUs: roofline, GPU data, choice between INT4 and INT8."""
