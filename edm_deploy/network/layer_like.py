"""A layer of another one's geometry with other numbers of channels."""

from __future__ import annotations

import torch
from torch import nn


def layer_like(layer: nn.Conv2d | nn.Linear, inputs: int, outputs: int, *, bias: bool) -> nn.Conv2d | nn.Linear:
    """A Linear, or an ungrouped Conv2d with the filter size, stride, padding and dilation of `layer`, on the meta device."""
    with torch.device("meta"):
        if isinstance(layer, nn.Linear):
            return nn.Linear(inputs, outputs, bias=bias)
        return nn.Conv2d(
            inputs,
            outputs,
            layer.kernel_size,  # type: ignore[arg-type]  # torch types the argument wider than the attribute
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=bias,
            padding_mode=layer.padding_mode,
        )
