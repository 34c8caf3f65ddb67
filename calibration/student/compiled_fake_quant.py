"""`fake_quantize` compiled by torch.compile: each pass over a tensor is one kernel, where `calibration.student.fake_quant` reads and writes it seven times.

The forward pass computes what that module computes, with the same roundings. Its gradients are computed in float32 in every dtype, and rounded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, overrides

from calibration.student.fake_quant import dense_format
from edm_deploy.numerics.activation_table import reciprocal


def compiled_fake_quantize(x: Tensor, scale: Tensor, qmin: Tensor, levels: int | Tensor) -> Tensor:
    """As `calibration.student.fake_quant.fake_quantize`. The first calls compile: once forward and once backward for each dtype of `x`."""
    result: Tensor = _CompiledFakeQuantize.apply(x, scale, qmin, levels)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result


class _CompiledFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, qmin: Tensor, levels: int | Tensor
    ) -> Tensor:  # Any: torch's context has no public type
        x = x.contiguous(memory_format=dense_format(x))
        bound = levels.float() if isinstance(levels, Tensor) else torch.full_like(qmin, levels)
        y = _like(x, _run(quantize_rows, _rows(x), scale, qmin, bound))
        ctx.save_for_backward(x, y, scale, qmin, bound)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, y, scale, qmin, bound = ctx.saved_tensors
        grad = grads[0].to(x.dtype).contiguous(memory_format=dense_format(x))
        grad_x, grad_scale, grad_qmin = _run(gradients_of_rows, _rows(grad), _rows(x), _rows(y), scale, qmin, bound)
        return _like(x, grad_x), grad_scale, grad_qmin, None


def quantize_rows(x: Tensor, scale: Tensor, qmin: Tensor, levels: Tensor) -> Tensor:
    """`clip(round(x / s), qmin, qmin + levels) * s` of each row: [N, M] in the dtype of `x`; scale, qmin and levels float32 [N]."""
    lowest = qmin[:, None]
    codes = torch.minimum(torch.maximum((x.float() * reciprocal(scale)[:, None]).round(), lowest), lowest + levels[:, None])
    return (codes * scale[:, None]).to(x.dtype)


def gradients_of_rows(grad: Tensor, x: Tensor, y: Tensor, scale: Tensor, qmin: Tensor, levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, [N, M], and to scale and qmin, float32 [N], of the result `y` of `quantize_rows`."""
    g, wide = grad.float(), x.float()
    position = wide * reciprocal(scale)[:, None] - qmin[:, None]
    within = torch.where((position > -0.5) & (position < levels[:, None] + 0.5), g, 0.0)
    return within.to(x.dtype), (g * y.float() - within * wide).sum(1) / scale, (g - within).sum(1) * scale


def _run(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """The result of a compiled function of tensors, which is compiled for their dtypes alone: not for what requires a gradient, nor inside a mode."""
    plain = [tensor.detach() for tensor in tensors]
    with overrides._pop_mode_temporarily() if torch._C._len_torch_function_stack() else nullcontext():
        return _compiled(function)(*plain)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True, fullgraph=True)


def _rows(x: Tensor) -> Tensor:
    """[N, M] in the order of memory, without a copy."""
    return (x.permute(0, 2, 3, 1) if dense_format(x) is torch.channels_last else x).reshape(x.shape[0], -1)


def _like(x: Tensor, rows: Tensor) -> Tensor:
    """`_rows` undone: the shape and the memory format of `x`."""
    if dense_format(x) is not torch.channels_last:
        return rows.view(x.shape)
    n, c, h, w = x.shape
    return rows.view(n, h, w, c).permute(0, 3, 1, 2)
