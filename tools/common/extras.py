"""The extra of the package that installs each optional dependency. Imports nothing, so that it works without any of them."""

from __future__ import annotations

EXTRAS = {
    "typer": "tools",
    "rich": "tools",
    "psutil": "tools",
    "onnx": "tools",
    "onnx_ir": "tools",
    "onnxscript": "tools",
    "pyarrow": "train",
    "ray": "ray",
    "polygraphy": "polygraphy",
    "accelerate": "parallel",
    "tensorboard": "parallel",
    "transformers": "pipelines",
    "sentencepiece": "pipelines",
    "fastapi": "serve",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
}  # top-level module -> extra of pyproject.toml


def missing_package(err: ModuleNotFoundError) -> str | None:
    """A message that names the missing package and the extra that installs it; None if no extra does."""
    package = (err.name or "").split(".")[0]
    if package not in EXTRAS:
        return None
    return f'This command needs the package {package}, which is not installed. Install it with pip install "edm-deploy[{EXTRAS[package]}]".'
