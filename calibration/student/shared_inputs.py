"""Which layers read the very same tensor, so that they can share one quantizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.network.family import SAMPLE
from edm_deploy.pipelines.source import Source


def shared_input_layers(model: nn.Module, forward: Any, inputs: Mapping[str, Tensor], sites: Mapping[str, nn.Module]) -> dict[str, str]:
    """For each site the first site that is fed the very same tensor (itself, for most), so that an exporter can share one quantization.

    Args:
        model: The float model.
        forward: The family's forward.
        inputs: Graph inputs by name; one forward is run on them.
        sites: Layers by name.
    """
    seen: list[tuple[Tensor, str]] = []  # holds the tensors, so that no address is used twice
    leaders = {name: name for name in sites}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            leaders[name] = next((leader for x, leader in seen if x is args[0]), name)
            seen.append((args[0], leaders[name]))

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in sites.items()]
    try:
        with torch.no_grad():
            forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return leaders


def example_inputs(source: Source, device: torch.device) -> dict[str, Tensor]:
    """Graph inputs of one sample, by name: noise in the middle of the schedule."""
    generator = torch.Generator().manual_seed(0)
    family = source.family_object
    sample = torch.randn(1, *family.sample_shape(source.config), generator=generator)
    inputs = {SAMPLE: sample, "timestep": torch.tensor([float(source.num_train_timesteps // 2)])}
    inputs |= family.random_conditioning(source.config, 1, generator)
    return {name: value.to(device) for name, value in inputs.items()}
