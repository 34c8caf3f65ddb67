"""The cuda backend's torch graph: quantized layers replaced by our operators, and their neighbours fused into them."""
