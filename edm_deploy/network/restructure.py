"""Rewrites of the float network that preserve its function: inputs split into segments, float branches, inputs scaled by channel or rotated in blocks.

All rewrite the network's modules, so that tracer, reference and backends process ordinary layers after a Split, a Mul or a MatMul, or next to an Add.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.errors import ArtifactError
from edm_deploy.network.layer_like import layer_like
from edm_deploy.network.low_rank_branch import BASE, BRANCH, BranchedLayer, unbranchable
from edm_deploy.network.rotation import prepare, problem_of, rotate, rotate_weight
from edm_deploy.storage.json_schema import convert

PRE_SCALE = "pre_scale"
ROTATED = "rotated_block"  # attribute of a layer: the size of the blocks in which its input is rotated
SEGMENT = "segment"
_PART = re.compile(rf"(\.{SEGMENT}\d+)?(\.{BASE}|\.{BRANCH}\.(down|up))?$")


@dataclass(frozen=True)
class NetworkRewrite:
    """Rewrites of a published network. In exact arithmetic its function is unchanged.

    Attributes:
        segments: For each layer that is split, the input channels of its parts in order. Part `i` is the layer `<name>.segment<i>`.
        pre_scaled: Layers (or parts of one) whose input is multiplied by their parameter `pre_scale`, float32 [Cin]; their weight is divided by it.
        branches: Ranks of float low-rank branches by layer, or part of one. The layer itself is then `<name>.base`, the branch's two layers are
            `<name>.branch.down` and `<name>.branch.up`, on the input before any pre-scale or rotation.
        rotated: For each linear layer (or part of one) whose input is rotated, the size of the blocks, a power of two; its weight is `W H^-1`. A
            pre-scale is applied before the rotation: it equalizes channels, which no longer exist after it.
    """

    segments: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    pre_scaled: tuple[str, ...] = ()
    branches: Mapping[str, int] = field(default_factory=dict)
    rotated: Mapping[str, int] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The rewrite as an artifact's description stores it; empty where nothing is rewritten."""
        segments = {"segments": {name: list(sizes) for name, sizes in self.segments.items()}} if self.segments else {}
        scaled = {"pre_scaled": list(self.pre_scaled)} if self.pre_scaled else {}
        sizes = {"branches": self.branches, "rotated": self.rotated}
        return segments | scaled | {name: dict(values) for name, values in sizes.items() if values}

    def summary(self) -> str:
        """A summary for reports."""
        split = [f"{name} into {' + '.join(map(str, sizes))} channels" for name, sizes in self.segments.items()]
        phrases = [f"{len(split)} layers split: {', '.join(split[:3])}{', ...' if split[3:] else ''}"] if split else []
        if named := self.pre_scaled[:3]:
            more = ", ..." if self.pre_scaled[3:] else ""
            phrases.append(f"{len(self.pre_scaled)} inputs scaled by channel: {', '.join(named)}{more}")
        if branches := [f"{name} of rank {rank}" for name, rank in self.branches.items()]:
            phrases.append(f"{len(branches)} layers with a float branch: {', '.join(branches[:3])}{', ...' if branches[3:] else ''}")
        if self.rotated:
            turned = [f"{name} in blocks of {block}" for name, block in self.rotated.items()]
            phrases.append(f"{len(turned)} inputs rotated: {', '.join(turned[:3])}{', ...' if turned[3:] else ''}")
        return "; ".join(phrases) or "as published"

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> NetworkRewrite:
        """Undo `to_json`; raises ArtifactError if a field has another type."""
        return convert(content, cls, path="structure")


PUBLISHED = NetworkRewrite()


class SplitInputLayer(nn.Module):
    """A Conv2d or Linear on a concatenation, computed as the sum of one layer for each of its tensors. The first holds the bias.

    Source: Li et al., Q-Diffusion, arXiv 2302.04304, section 4.3 (shortcut-splitting quantization).

    Args:
        layer: The layer to split, ungrouped; the parts hold its weight and bias as float32.
        sizes: Input channels of each part.
    """

    def __init__(self, layer: nn.Conv2d | nn.Linear, sizes: Sequence[int]) -> None:
        super().__init__()
        self.sizes = tuple(sizes)
        self.axis = 1 if isinstance(layer, nn.Conv2d) else -1
        for index, weight in enumerate(torch.split(layer.weight.detach(), list(self.sizes), dim=1)):
            part = layer_like(layer, weight.shape[1], len(weight), bias=layer.bias is not None and index == 0)
            part.weight = nn.Parameter(weight.float().contiguous(), requires_grad=layer.weight.requires_grad)
            if part.bias is not None and layer.bias is not None:
                bias = layer.bias
                part.bias = bias if bias.dtype == torch.float32 else nn.Parameter(bias.detach().float(), requires_grad=bias.requires_grad)
            self.add_module(f"{SEGMENT}{index}", part)

    def forward(self, x: Tensor, *_: object) -> Tensor:
        """The output of the whole layer, for its whole input."""
        parts = [part(piece) for part, piece in zip(self.children(), torch.split(x, list(self.sizes), dim=self.axis), strict=True)]
        total: Tensor = sum(parts[1:], start=parts[0])
        return total


def layer_of(site: str) -> str:
    """The published layer that a layer is, or is a part of: a segment, the quantized base or the branch."""
    return _PART.sub("", site)


def restructure(model: nn.Module, structure: NetworkRewrite) -> None:
    """Rewrite a network in place. Pre-scales are initialized to 1, branches to 0; neither changes a weight, and rotations rotate theirs.

    Raises:
        ArtifactError: A layer does not exist, or cannot be rewritten so.
    """
    for name, sizes in structure.segments.items():
        layer = _layer(model, name)
        if problem := _unsplittable(layer, sizes):
            raise ArtifactError(f"Layer {name!r} cannot be split into segments {list(sizes)}: {problem}.")
        replace_module(model, name, SplitInputLayer(layer, sizes))
    for name, rank in structure.branches.items():
        layer = _layer(model, name)
        if problem := unbranchable(layer, rank):
            raise ArtifactError(f"Layer {name!r} cannot have a branch of rank {rank}: {problem}.")
        replace_module(model, name, BranchedLayer(layer, rank))
    for name in structure.pre_scaled:
        layer = _layer(model, name)
        if hasattr(layer, PRE_SCALE):
            raise ArtifactError(f"Layer {name!r} is listed twice among the layers whose input is scaled.")
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            raise ArtifactError(f"Layer {name!r} is a grouped convolution; its input cannot be scaled by channel.")
        layer.register_parameter(
            PRE_SCALE, nn.Parameter(torch.ones(layer.weight.shape[1], device=layer.weight.device), requires_grad=False)
        )
    for name, block in structure.rotated.items():
        layer = _layer(model, name)
        if problem := problem_of(layer, block):
            raise ArtifactError(f"Layer {name!r}: its input cannot be rotated in blocks of {block}: {problem}.")
        prepare(block)
        setattr(layer, ROTATED, block)
        if not layer.weight.is_meta:
            layer.weight = nn.Parameter(rotate_weight(layer.weight.detach(), block), requires_grad=layer.weight.requires_grad)
    for name in dict.fromkeys((*structure.pre_scaled, *structure.rotated)):
        _layer(model, name).register_forward_pre_hook(_prepare_input)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule `name`."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def block_of(layer: nn.Module) -> int | None:
    """The size of the blocks in which a layer's input is rotated, or None."""
    block: int | None = getattr(layer, ROTATED, None)
    return block


def site_input(layer: nn.Module, x: Tensor) -> Tensor:
    """The input of the layer's arithmetic: `x` multiplied by the layer's pre-scale where it has one, then rotated where it is; in the dtype of `x`."""
    scale: Tensor | None = getattr(layer, PRE_SCALE, None)
    if scale is not None:
        x = x * scale.to(x.dtype).reshape(-1, *[1] * (x.ndim - 2 if isinstance(layer, nn.Conv2d) else 0))
    return x if (block := block_of(layer)) is None else rotate(x, block)


def site_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """What multiplies the result of `site_input`: `weight`, as the layer holds it, float32, divided by the layer's pre-scale where it has one."""
    return weight if getattr(layer, PRE_SCALE, None) is None else _by_channel(layer, weight, Tensor.div)


def weight_to_hold(layer: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `site_weight`: the weight that the layer must hold for `weight` to multiply its input."""
    return weight if getattr(layer, PRE_SCALE, None) is None else _by_channel(layer, weight, Tensor.mul)


def published_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """`weight`, as the layer holds it, float32, for the input of the published layer: not rotated."""
    return weight if (block := block_of(layer)) is None else rotate(weight, block)


def rotated_weight(layer: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of `published_weight`."""
    return weight if (block := block_of(layer)) is None else rotate_weight(weight, block)


def _by_channel(layer: nn.Module, weight: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A weight multiplied or divided by the layer's pre-scale, which comes before its rotation."""
    scale = getattr(layer, PRE_SCALE).reshape(-1, *[1] * (weight.ndim - 2))
    return rotated_weight(layer, apply(published_weight(layer, weight), scale))


def representable(scale: Tensor) -> Tensor:
    """Round a pre-scale to float16, as float32 [Cin], so that a float16 graph multiplies by exactly the number that the weights were divided by."""
    finest, largest = torch.finfo(torch.float16).smallest_normal, torch.finfo(torch.float16).max
    return scale.detach().float().clamp(finest, largest).half().float()


def _prepare_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return site_input(layer, args[0]), *args[1:]


def _layer(model: nn.Module, name: str) -> nn.Conv2d | nn.Linear:
    layer: nn.Module | None
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        layer = None
    if not isinstance(layer, nn.Conv2d | nn.Linear):
        raise ArtifactError(
            f"Layer {name!r} is not a convolution or linear layer of this model, so that it cannot be split, scaled, rotated or have a branch."
        )
    return layer


def _unsplittable(layer: nn.Conv2d | nn.Linear, sizes: Sequence[int]) -> str | None:
    """The reason why a layer's input cannot be split so, as a phrase, or None."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return "it is a grouped convolution"
    if len(sizes) < 2 or min(sizes) < 1 or sum(sizes) != layer.weight.shape[1]:
        return f"it has {layer.weight.shape[1]} input channels, expected two or more parts that add up to that number"
    return None
