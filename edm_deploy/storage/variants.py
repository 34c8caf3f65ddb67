"""Variants of weights as diffusers names them: `diffusion_pytorch_model.fp16.safetensors`, also with shards."""

from __future__ import annotations

import re
from pathlib import Path

FILE = re.compile(r"[^.]+(?:\.(?P<variant>\w+))?(?:-\d+-of-\d+)?(?:\.(?P<older>\w+))?\.safetensors")  # older: the variant behind the shard


def variant_of(component: Path) -> str | None:
    """The variant of the weights in the directory of a model, `fp16`; None where it has weights without one, or of several variants."""
    matches = [FILE.fullmatch(path.name) for path in component.glob("*.safetensors")]
    variants = {match["variant"] or match["older"] for match in matches if match}
    return variants.pop() if len(variants) == 1 else None


def variant_in(pipeline: Path) -> str | None:
    """The first variant that a component of a pipeline has only; diffusers loads components without it as usual."""
    found = (variant_of(path) for path in sorted(pipeline.iterdir()) if path.is_dir())
    return next((variant for variant in found if variant), None)
