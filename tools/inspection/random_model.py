"""Write a published architecture with random weights as a diffusers directory, tensor by tensor: real sizes without a download."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.meta_model import meta_model
from edm_deploy.numerics.seeds import check_seed
from edm_deploy.storage.directories import INDEX_FILE, PIPELINE_NAMES, SCHEDULER_FILE, write_json
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
from edm_deploy.storage.tensor_file import DeferredTensor, write_tensors
from edm_deploy_tools.inspection.architectures import Architecture


def write_random_model(chosen: Architecture, out: Path, *, size: int | None = None, seed: int = 0) -> Path:
    """Write the denoiser and its scheduler to directory `out`, completely or not at all; weights are float16.

    Args:
        chosen: The architecture.
        out: Output directory.
        size: Height and width of a sample; None is that of the architecture. It does not change the weights of a convolutional model.
        seed: Random seed of the weights.

    Raises:
        UnsupportedError: There is no family for the architecture.
        ArtifactError: `out` cannot be written.
        InputError: As check_seed.
    """
    check_seed(seed)
    family = family_named(name_of_family(chosen.class_name))
    config = dict(chosen.config) | ({} if size is None else {"sample_size": size})
    index = {
        "_class_name": chosen.pipeline_class,
        family.component: ["diffusers", chosen.class_name],
        "scheduler": ["diffusers", chosen.scheduler_class],
    }
    kind = DirectoryKind("a pipeline", INDEX_FILE, (*PIPELINE_NAMES, family.component))
    with new_directory(out, kind=kind, overwrite=False) as directory:
        write_json(directory / INDEX_FILE, index)
        write_json(directory / SCHEDULER_FILE, {"_class_name": chosen.scheduler_class, **chosen.scheduler_config})
        write_json(directory / family.component / "config.json", {"_class_name": chosen.class_name, **config})
        weights = directory / family.component / "diffusion_pytorch_model.safetensors"
        write_tensors(weights, random_weights(meta_model(family, config).state_dict(), seed))
    return out


def random_weights(shapes: Mapping[str, Tensor], seed: int) -> dict[str, DeferredTensor]:
    """float16 tensors of these names and shapes, each generated when it is written. Products keep the variance of their input; norms are initialized to 1."""
    return {
        name: DeferredTensor(torch.float16, tuple(value.shape), partial(_random, name, tuple(value.shape), seed + number))
        for number, (name, value) in enumerate(shapes.items())
    }


def _random(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) < 2:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.float16)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.div_(torch.Size(shape[1:]).numel() ** 0.5).half()


def weight_bytes(model: Path) -> int:
    """Size of the float weights of a diffusers directory in bytes."""
    return sum(path.stat().st_size for path in model.rglob("*.safetensors"))
