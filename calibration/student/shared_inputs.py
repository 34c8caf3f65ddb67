"""Layers that receive the same input tensor, so that they can share one quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.network.family import SAMPLE, Config, Family
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import NetworkRewrite


def shared_inputs(family: Family, config: Config, structure: NetworkRewrite) -> dict[str, str]:
    """For each site the first site that receives the same tensor (most sites: itself). One forward pass on the meta device.

    Args:
        family: Family of the model.
        config: Its configuration.
        structure: Layers that are split into segments.
    """
    model = meta_model(family, config, structure)
    sites = family.sites(model)
    inputs: list[tuple[Tensor, str]] = []  # holds the tensors, so that no id is reused
    first_site = {name: name for name in sites}

    def record(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            first_site[name] = next((first for x, first in inputs if x is args[0]), name)
            inputs.append((args[0], first_site[name]))

        return hook

    for name, layer in sites.items():
        layer.register_forward_pre_hook(record(name))
    with torch.no_grad():
        family.forward(model, meta_inputs(family, config, batch=1))
    return first_site


def meta_inputs(family: Family, config: Config, *, batch: int) -> dict[str, Tensor]:
    """Graph inputs by name, [batch, ...] each, on the meta device."""
    conditioning = family.random_conditioning(config, batch, torch.Generator().manual_seed(0))
    inputs = {SAMPLE: torch.empty(batch, *family.sample_shape(config)), "timestep": torch.zeros(batch), **conditioning}
    return {name: value.to("meta") for name, value in inputs.items()}
