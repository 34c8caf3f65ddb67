"""Rotary position embedding as an operator: checks, CPU implementation, launch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import InputError
from engines.kernels import cuda_ops, driver
from engines.kernels.checks import FLOATS, check_size
from engines.kernels.launch import OCTET, RotaryParams, rotary_launch

SCHEMA = "(Tensor x, Tensor cosine, Tensor sine) -> Tensor"


def rotary(traced: bool, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """X with each pair of neighbouring channels turned by its token's angle, in float32, each step rounded separately.

    `out[2i] = x[2i] * cosine[2i] - x[2i + 1] * sine[2i]`, `out[2i + 1] = x[2i + 1] * cosine[2i + 1] + x[2i] * sine[2i + 1]`.

    Args:
        traced: Whether only shapes are computed.
        x: float16 or bfloat16 [B, L, H, D], D a multiple of 8.
        cosine: float32 [L, D].
        sine: float32 [L, D].

    Returns:
        As x, contiguous.

    Raises:
        InputError: An operand has another type or shape.
        UnsupportedError: x has 2^31 elements or more.
    """
    if x.dtype not in FLOATS or x.ndim != 4 or x.shape[-1] % OCTET:
        raise InputError(
            f"rotary: x is {x.dtype} {list(x.shape)}; expected float16 or bfloat16 [B, L, H, D] with D a multiple of {OCTET}. Rotate it in torch."
        )
    for name, angles in (("cosine", cosine), ("sine", sine)):
        if angles.dtype != torch.float32 or tuple(angles.shape) != (x.shape[1], x.shape[3]) or angles.device != x.device:
            raise InputError(
                f"rotary: {name} is {angles.dtype} {list(angles.shape)} on {angles.device}; "
                f"expected float32 {[x.shape[1], x.shape[3]]} on {x.device}."
            )
    if traced:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    check_size("rotary", x=x.shape)
    return (on_cuda if x.is_cuda else on_cpu)(x, cosine, sine)


def on_cpu(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """As the kernel computes it, in torch."""
    values: Any = x.float()
    even, odd = values[..., ::2], values[..., 1::2]
    cosine, sine = cosine[:, None], sine[:, None]
    turned = torch.stack([even * cosine[..., ::2] - odd * sine[..., ::2], odd * cosine[..., 1::2] + even * sine[..., 1::2]], dim=-1)
    return turned.flatten(-2).to(x.dtype).contiguous()


def on_cuda(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """The kernel on the current stream."""
    x, cosine, sine = (cuda_ops.aligned(each.contiguous()) for each in (x, cosine, sine))
    out = torch.empty_like(x)
    batch, length, heads, width = x.shape
    addresses = {"x": x.data_ptr(), "cosine": cosine.data_ptr(), "sine": sine.data_ptr(), "out": out.data_ptr()}
    params = RotaryParams(**addresses, N=batch, L=length, H=heads, D=width)
    driver.launch([rotary_launch(params, type_name=cuda_ops.TYPE_NAMES[x.dtype])], x.device)
    return out
