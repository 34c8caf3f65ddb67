"""diffusers pipelines: read one, rebuild one around an engine, encode prompts, sample."""
