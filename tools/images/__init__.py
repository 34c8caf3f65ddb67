"""Images: sampling from an engine, pipeline arguments, decoding, datasets."""
