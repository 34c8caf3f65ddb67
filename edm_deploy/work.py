"""What a denoiser computes, from shapes alone: every layer's sizes and multiply-accumulates, and those outside the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edm_deploy.family import SAMPLE, Config, Family, skeleton


@dataclass(frozen=True, kw_only=True)
class SiteWork:
    """Sizes of one Conv2d or Linear, for one sample at the model's own size.

    Attributes:
        channels: Input channels of one filter.
        taps: Filter positions, 9 for 3x3; 1 for a Linear.
        outputs: Output channels.
        inputs_at: Positions of the input, pixels or tokens.
        outputs_at: Positions of the output.
    """

    channels: int
    taps: int
    outputs: int
    inputs_at: int
    outputs_at: int

    @property
    def weights(self) -> int:
        """Elements of the weight."""
        return self.channels * self.taps * self.outputs

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample."""
        return self.weights * self.outputs_at


@dataclass(frozen=True, kw_only=True)
class ModelWork:
    """Work of one forward pass of one sample at the model's own size.

    Attributes:
        sites: By layer name, in the model's order; a layer that is used twice counts its positions twice.
        leaders: For each site the first one that is fed the very same tensor: itself, or the sibling whose quantized input it can share.
        other_macs: Multiply-accumulates outside the sites: attention's two matmuls above all.
        parameters: Of the whole model.
    """

    sites: Mapping[str, SiteWork]
    leaders: Mapping[str, str]
    other_macs: int
    parameters: int

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the whole model."""
        return sum(site.macs for site in self.sites.values()) + self.other_macs


def model_work(family: Family, config: Config) -> ModelWork:
    """Run the model once on the meta device, which costs neither memory nor arithmetic, and write down what each layer saw.

    Raises:
        UnsupportedError: The family cannot build this config.
    """
    model = skeleton(family, config)
    seen: dict[str, list[SiteWork]] = {}
    fed: list[tuple[Tensor, str]] = []  # keeps the inputs, which take no memory, so that none takes another's identity

    def look(name: str, layer: nn.Module, x: Tensor, y: Tensor) -> None:
        seen.setdefault(name, []).append(_site_work(layer, x, y))
        fed.append((x, name))

    for name, layer in family.sites(model).items():
        layer.register_forward_hook(lambda module, args, y, name=name: look(name, module, args[0], y))
    conditioning = family.random_conditioning(config, 1, torch.Generator().manual_seed(0))
    inputs = {SAMPLE: torch.empty(1, *family.sample_shape(config), device="meta"), "timestep": torch.zeros(1, device="meta")}
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        family.forward(model, inputs | {name: value.to("meta") for name, value in conditioning.items()})
    sites = {name: _sum(seen[name]) for name in family.sites(model) if name in seen}
    return ModelWork(
        sites=sites,
        leaders=_leaders(fed),
        other_macs=max(0, counter.get_total_flops() // 2 - sum(site.macs for site in sites.values())),
        parameters=sum(value.numel() for value in model.parameters()),
    )


def _site_work(layer: Any, x: Tensor, y: Tensor) -> SiteWork:
    if isinstance(layer, nn.Conv2d):
        outputs, channels, *window = layer.weight.shape
        return SiteWork(
            channels=channels,
            taps=window[0] * window[1],
            outputs=outputs,
            inputs_at=x.numel() // x.shape[1],
            outputs_at=y.numel() // y.shape[1],
        )
    positions = x.numel() // x.shape[-1]
    return SiteWork(channels=x.shape[-1], taps=1, outputs=y.shape[-1], inputs_at=positions, outputs_at=positions)


def _leaders(fed: list[tuple[Tensor, str]]) -> dict[str, str]:
    first: dict[int, str] = {}
    leaders: dict[str, str] = {}
    for x, name in fed:
        leaders.setdefault(name, first.setdefault(id(x), name))
    return leaders


def _sum(uses: list[SiteWork]) -> SiteWork:
    first = uses[0]
    return SiteWork(
        channels=first.channels,
        taps=first.taps,
        outputs=first.outputs,
        inputs_at=sum(use.inputs_at for use in uses),
        outputs_at=sum(use.outputs_at for use in uses),
    )
