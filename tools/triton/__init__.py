"""A model repository for NVIDIA Triton Inference Server: `repository` writes it, `served_pipeline` is a part of it, `client` asks it."""
