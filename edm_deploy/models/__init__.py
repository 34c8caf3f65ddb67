"""Model families, one a file. The only folder below `tools/` that may import diffusers."""
