"""Low-rank adapters (LoRA) as inputs of a denoiser's graph: which layers have a branch, the names and shapes of its weights, its arithmetic.

    y = site(x) + ((x down^T) * scale) up^T          scale [B, R]: the weights of the R rank slots, sample by sample

Source: Hu et al., LoRA, arXiv 2106.09685, section 4.1. The slots hold the ranks of all loaded adapters next to each other, as Chen et al., Punica,
arXiv 2310.18547, serve one adapter for each sample of a batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from msgspec import Meta
from torch import Tensor, nn
from torch.nn import functional

from edm_deploy.errors import InputError
from edm_deploy.network.family import Family, ModelInput
from edm_deploy.network.restructure import layer_of
from edm_deploy.storage.json_schema import Size

SLOT_SCALES = "lora.scale"  # the input with the weights of the rank slots, [B, R]
MAX_RANK = 1024
Rank = Annotated[int, Meta(ge=1, le=MAX_RANK)]


@dataclass(frozen=True)
class AdapterInputs:
    """The adapter branches of a graph.

    Attributes:
        rank: Number of rank slots R: the largest sum of the ranks of the adapters that are loaded at once.
        layers: Shape of the weight, [Cout, Cin] or [Cout, Cin, kh, kw], of each site that has a branch.
    """

    rank: Rank
    layers: Mapping[str, tuple[Size, ...]]

    @property
    def weights(self) -> tuple[ModelInput, ...]:
        """The inputs that hold weights: for each site `down` [R, Cin, ...] and `up` [Cout, R, ...], which do not depend on the batch."""
        pairs = ((down_input(name), up_input(name), shape) for name, shape in self.layers.items())
        return tuple(
            ModelInput(label, "float", dims)
            for down, up, (outputs, *rest) in pairs
            for label, dims in ((down, (self.rank, *rest)), (up, (outputs, self.rank, *[1] * (len(rest) - 1))))
        )

    @property
    def inputs(self) -> tuple[ModelInput, ...]:
        """All inputs of the branches, in the order in which they follow those of the denoiser."""
        return (ModelInput(SLOT_SCALES, "float", ("batch", self.rank)), *self.weights)

    def zeros(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """Weights of no adapter, by input. All are views of the same memory, which nothing writes."""
        sizes = {declared.name: [size for size in declared.dims if isinstance(size, int)] for declared in self.weights}
        memory = torch.zeros(max((torch.Size(size).numel() for size in sizes.values()), default=0), dtype=dtype, device=device)
        return {name: memory[: torch.Size(size).numel()].view(size) for name, size in sizes.items()}


def down_input(site: str) -> str:
    """Name of the input with a branch's first weight, [R, Cin, ...]."""
    return f"lora.{site}.down"


def up_input(site: str) -> str:
    """Name of the input with a branch's second weight, [Cout, R, ...]."""
    return f"lora.{site}.up"


def adapter_inputs(family: Family, model: nn.Module, sites: Iterable[str], *, rank: int, pattern: str | None = None) -> AdapterInputs:
    """The branches that a graph gets.

    Args:
        family: Family of the model.
        model: The restructured network, which may be on the meta device.
        sites: Names of its quantized layers.
        rank: Number of rank slots.
        pattern: Regular expression that is searched in a layer's published name; None is the family's `lora_layers`.

    Raises:
        InputError: The rank is out of range, the expression is none, or it matches no quantized layer.
    """
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"--lora-rank {rank}: expected 1 to {MAX_RANK}.")
    pattern = family.lora_layers if pattern is None else pattern
    try:
        matches = re.compile(pattern).search
    except re.error as err:
        raise InputError(f"--lora-layers {pattern!r} is no regular expression: {err}.") from err
    layers = family.sites(model)
    shapes = {name: tuple(layers[name].weight.shape) for name in sites if matches(layer_of(name)) and _adaptable(layers[name])}
    if not shapes:
        raise InputError(f"--lora-layers {pattern!r} matches none of the quantized layers, such as {next(iter(sites), 'none')}.")
    return AdapterInputs(rank, shapes)


def _adaptable(layer: nn.Conv2d | nn.Linear) -> bool:
    return isinstance(layer, nn.Linear) or layer.groups == 1


def branch(layer: nn.Conv2d | nn.Linear, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """The output of one adapter branch, in the type of `x`.

    Args:
        layer: The layer, for its geometry.
        x: The site's input, [B, ..., Cin] of a Linear or [B, Cin, H, W], after its pre-scale if it has one.
        down: [R, Cin] or [R, Cin, kh, kw].
        up: [Cout, R] or [Cout, R, 1, 1].
        scale: [B, R].
    """
    if isinstance(layer, nn.Linear):
        return linear_branch(x, down, up, scale)
    return conv_branch(x, down, up, scale, list(layer.stride), layer.padding, list(layer.dilation))


def linear_branch(x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """As `branch`, of a Linear."""
    return functional.linear(linear_low(x, down, scale), up)


def linear_low(x: Tensor, down: Tensor, scale: Tensor) -> Tensor:
    """The first product of `linear_branch`, [B, ..., R]."""
    by_sample = scale.reshape(len(scale), *[1] * (x.ndim - 2), -1)
    return functional.linear(x, down) * by_sample


def conv_branch(
    x: Tensor, down: Tensor, up: Tensor, scale: Tensor, stride: list[int], padding: str | tuple[int, ...] | list[int], dilation: list[int]
) -> Tensor:
    """As `branch`, of a convolution."""
    return functional.conv2d(conv_low(x, down, scale, stride, padding, dilation), up)


def conv_low(
    x: Tensor, down: Tensor, scale: Tensor, stride: list[int], padding: str | tuple[int, ...] | list[int], dilation: list[int]
) -> Tensor:
    """The first product of `conv_branch`, [B, R, H, W]."""
    low = functional.conv2d(x, down, None, stride, padding if isinstance(padding, str) else list(padding), dilation)
    return low * scale[:, :, None, None]
