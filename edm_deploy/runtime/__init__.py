"""Open and run engines: manifest, backend contract, drop-in denoiser."""
