"""Build a float model on the meta device, with a bound on its number of layers: a config may come from a damaged or hostile file."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from edm_deploy.errors import ArtifactError
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Family
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite, restructure

MAX_PARAMETERS = 6000  # parameter tensors of a model; SDXL has 1680, FLUX.1 780


def meta_model(family: Family, config: Config, structure: NetworkRewrite = PUBLISHED) -> nn.Module:
    """The float model on the meta device: names and shapes without memory.

    Raises:
        UnsupportedError: The family does not support the config.
        ArtifactError: The structure names a layer that the model does not have, or the model has more than MAX_PARAMETERS parameter tensors.
    """
    with torch.device("meta"), _limited_parameters(family.class_name):
        model = family.build(config).eval().requires_grad_(False)
        restructure(model, structure)
    return model


def meta_inputs(family: Family, config: Config, batch: int = 1) -> dict[str, Tensor]:
    """Graph inputs of `batch` samples on the meta device, by name: shapes and dtypes without values."""
    inputs = {SAMPLE: torch.empty(batch, *family.sample_shape(config), device="meta"), TIMESTEP.name: torch.zeros(batch)}
    inputs |= family.random_conditioning(config, batch, torch.Generator().manual_seed(0))
    return {name: value.to("meta") for name, value in inputs.items()}


@contextlib.contextmanager
def _limited_parameters(class_name: str) -> Iterator[None]:
    """Stop the construction of a model that has too many layers before it takes minutes. Other threads' models are not counted."""
    thread, count = threading.get_ident(), 0

    def limit(*_: object) -> None:
        nonlocal count
        count += threading.get_ident() == thread
        if count > MAX_PARAMETERS:
            raise ArtifactError(
                f"This config describes a {class_name} of more than {MAX_PARAMETERS} parameter tensors, more than any published model has. "
                "Check the numbers of layers in the config."
            )

    handle = register_module_parameter_registration_hook(limit)
    try:
        yield
    finally:
        handle.remove()
