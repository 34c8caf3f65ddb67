"""Expected times of layers on GPUs: roofline model, GPU data, selection of INT4 or INT8."""
