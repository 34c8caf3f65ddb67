"""Differentiable fake quantization: quantize and dequantize, with a hand-written backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from edm_deploy.numerics.activation_table import reciprocal
from edm_deploy.numerics.codes import per_channel

FakeQuantize = Callable[[Tensor, Tensor, Tensor, int | Tensor], Tensor]


def fake_quantize(x: Tensor, scale: Tensor, qmin: Tensor, levels: int | Tensor) -> Tensor:
    """`clip(round(x / s), qmin, qmin + levels) * s` along the first axis: samples of an activation, output channels of a weight.

    The codes are computed in float32 with the float32 reciprocal that the reference multiplies by. Gradients, with `u = x / s` and the
    rounding taken as the identity (straight-through estimator):

    - to x: the incoming gradient where `u` rounds to a code within the bounds, 0 elsewhere;
    - to s: `round(u) - u` within the bounds, the bound outside (LSQ, arXiv 1902.08153, equation 3, without its gradient scale);
    - to qmin, which moves both bounds: `s` outside, 0 within.

    Args:
        x: float [N, ...]; the result has its dtype.
        scale: float32 [N], each > 0.
        qmin: float32 [N] with integer values.
        levels: Number of codes minus one; one for all, or float32 [N] with integer values.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, qmin, levels)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result


def round_straight_through(x: Tensor) -> Tensor:
    """`round(x)`, half to even, with the gradient of the identity."""
    return x + (x.round() - x).detach()


def dense_format(x: Tensor) -> torch.memory_format:
    """The format in which `x` is dense: channels_last where it is that and not contiguous, else contiguous, which copies what is neither."""
    dense = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if dense else torch.contiguous_format


class _FakeQuantize(torch.autograd.Function):
    # Only x and the result are saved for backward, in the dtype of x: a following convolution saves the result anyway.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, qmin: Tensor, levels: int | Tensor
    ) -> Tensor:  # Any: torch's context has no public type
        lowest = per_channel(qmin, x)
        codes = x.float() if x.dtype != torch.float32 else x.clone()
        codes.mul_(per_channel(reciprocal(scale), x)).round_()
        torch.maximum(codes, lowest, out=codes)
        torch.minimum(codes, lowest + (levels if isinstance(levels, int) else per_channel(levels, x)), out=codes)
        y = codes.mul_(per_channel(scale, x)).to(x.dtype)
        ctx.save_for_backward(x, y, scale, qmin)
        ctx.levels = levels
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, y, scale, qmin = ctx.saved_tensors
        grad = grads[0].to(x.dtype)
        # All of this in the dtype of x: bfloat16 halves the memory traffic, and only values within 2^-8 of a bound may be assigned to its other side.
        # Shifted so that the bounds are the same two numbers for every sample: one fused kernel then computes and applies the mask.
        position = x * per_channel(reciprocal(scale), x).to(x.dtype)
        position.sub_(per_channel(qmin, x).to(x.dtype))
        if isinstance(ctx.levels, int):
            grad_x = torch.ops.aten.hardtanh_backward(grad, position, -0.5, ctx.levels + 0.5)
        else:
            grad_x = grad * ((position > -0.5) & (position < per_channel(ctx.levels, x).to(x.dtype) + 0.5))
        grad_scale = grad_qmin = None
        if ctx.needs_input_grad[1]:
            product = torch.mul(grad, y, out=position).addcmul_(grad_x, x, value=-1)
            grad_scale = _sums(product).div_(scale)
        if ctx.needs_input_grad[2]:
            grad_qmin = _sums(torch.sub(grad, grad_x, out=position)).mul_(scale)
        return grad_x, grad_scale, grad_qmin, None


def _sums(values: Tensor) -> Tensor:
    return values.sum(dim=tuple(range(1, values.ndim)), dtype=torch.float32)
