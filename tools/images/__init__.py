"""Images: sampling from an engine, arguments of the pipeline, datasets."""
