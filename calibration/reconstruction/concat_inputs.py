"""Layers whose input is a concatenation along channels, found by tracing the concatenations of a forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from edm_deploy.network.family import Config, Family
from edm_deploy.network.meta_model import meta_inputs, meta_model

_JOIN: frozenset[Callable[..., Any]] = frozenset({torch.cat, torch.concat, torch.concatenate})
# Functions that preserve channels, so that the segments continue to a layer behind them.
_KEEP: frozenset[Callable[..., Any]] = frozenset(
    {
        functional.group_norm,
        functional.silu,
        functional.gelu,
        functional.relu,
        functional.dropout,
        functional.interpolate,
        torch.group_norm,
        torch.Tensor.contiguous,
        torch.Tensor.to,
    }
)


def concatenated_inputs(family: Family, config: Config, *, through: bool) -> dict[str, tuple[int, ...]]:
    """For each site whose input is a concatenation along its channels, the channels of each part.

    One forward pass on the meta device, independent of layer names. Of the sites that are kept at 8 bit, shortcuts are included.

    Args:
        family: Family of the model.
        config: Its configuration.
        through: Whether layers behind a norm, an activation or a resize of the concatenation are included.
    """
    model = meta_model(family, config)
    tracer = _ConcatTracer(through)
    segments: dict[str, tuple[int, ...]] = {}

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes = tracer.segments(args[0], 1 if isinstance(layer, nn.Conv2d) else args[0].ndim - 1)
            if sizes and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
                segments[name] = sizes

        return hook

    for name, layer in family.sites(model).items():
        if family.placement(name) == "quantize" or family.group(name) == "skip":
            layer.register_forward_pre_hook(record(name))
    with tracer, torch.no_grad():
        family.forward(model, meta_inputs(family, config))
    return segments


class _ConcatTracer(TorchFunctionMode):
    """Records the tensors that are concatenations, and the results of channel-preserving functions of them."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.through = through
        self.joined: list[tuple[Tensor, int, tuple[int, ...]]] = []  # holds the tensors, so that no id is reused

    def segments(self, x: Tensor, axis: int) -> tuple[int, ...]:
        """Sizes of the parts of `x` along `axis`; empty if it is not a concatenation along it."""
        return next((sizes for tensor, dim, sizes in self.joined if tensor is x and dim == axis), ())

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function in _JOIN:
            tensors = args[0] if args else kwargs["tensors"]
            axis = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % out.ndim
            self.joined.append((out, axis, tuple(int(tensor.shape[axis]) for tensor in tensors)))
        elif self.through and function in _KEEP and isinstance(out, Tensor):
            self.joined += [(out, axis, sizes) for tensor, axis, sizes in self.joined if tensor is args[0] and tensor is not out]
        return out
