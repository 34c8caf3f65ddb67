"""Which layers see several tensors side by side in their input channels: the concatenations of a forward pass, followed to the layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from edm_deploy.network.family import Config, Family, meta_inputs, meta_model

_JOIN: frozenset[Callable[..., Any]] = frozenset({torch.cat, torch.concat, torch.concatenate})
# What leaves every channel where it is, so that a layer behind sees the segments still.
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
    """For each site whose input is a concatenation along its channels, the channels of every part.

    One forward pass on the meta device: what is joined is seen as it happens, whatever the layers are called. Sites that are kept at 8 bit are left out.

    Args:
        family: Of the model.
        config: Likewise.
        through: Whether layers behind a norm, an activation or a resize of the concatenation count too.
    """
    model = meta_model(family, config)
    joined = _Joined(through)
    found: dict[str, tuple[int, ...]] = {}

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            sizes = joined.segments(args[0], 1 if isinstance(layer, nn.Conv2d) else args[0].ndim - 1)
            if sizes and not (isinstance(layer, nn.Conv2d) and layer.groups > 1):
                found[name] = sizes

        return hook

    for name, layer in family.sites(model).items():
        if family.placement(name) == "quantize":
            layer.register_forward_pre_hook(look(name))
    with joined, torch.no_grad():
        family.forward(model, meta_inputs(family, config))
    return found


class _Joined(TorchFunctionMode):
    """Remembers the tensors that were joined, and what became of them."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.through = through
        self.seen: list[tuple[Tensor, int, tuple[int, ...]]] = []  # holds the tensors, so that no address is used twice

    def segments(self, x: Tensor, axis: int) -> tuple[int, ...]:
        """Sizes of the parts of `x` along `axis`; empty where it is no concatenation along it."""
        return next((sizes for tensor, at, sizes in self.seen if tensor is x and at == axis), ())

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        if function in _JOIN:
            tensors = args[0] if args else kwargs["tensors"]
            axis = (args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))) % out.ndim
            self.seen.append((out, axis, tuple(int(tensor.shape[axis]) for tensor in tensors)))
        elif self.through and function in _KEEP and isinstance(out, Tensor):
            self.seen += [(out, axis, sizes) for tensor, axis, sizes in self.seen if tensor is args[0] and tensor is not out]
        return out
