"""`fake_quantize` by the kernels in C++: forward and backward read and write each tensor once, where torch's operators do so seven and eight times."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from calibration.student.fake_quant import dense_format, fake_quantize
from calibration.training.cpp.library import FAKE_QUANT_CHUNK, FakeQuantParams, library

TYPES = {torch.float32: 0, torch.bfloat16: 1}
VALUES_PER_THREAD = 1 << 14  # below which starting another thread takes longer than it saves


def cpp_fake_quantize(x: Tensor, scale: Tensor, qmin: Tensor, levels: int | Tensor) -> Tensor:
    """As `calibration.student.fake_quant.fake_quantize`, and by it where `x` is neither float32 nor bfloat16.

    The result has the values of that function. Gradients are computed in float32 in either dtype and rounded once. Sums do not depend on the number of threads.
    """
    if x.dtype not in TYPES:
        return fake_quantize(x, scale, qmin, levels)
    ranges = (each.float().expand(len(x)) for each in (scale, qmin, levels if isinstance(levels, Tensor) else qmin.new_tensor(levels)))
    result: Tensor = _FakeQuantize.apply(x, *ranges)  # type: ignore[no-untyped-call]  # torch leaves apply untyped
    return result


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, qmin: Tensor, levels: Tensor) -> Tensor:  # Any: torch's context has no public type
        x = x.contiguous(memory_format=dense_format(x))
        ranges = scale.contiguous(), qmin.contiguous(), levels.contiguous()
        y = torch.empty_like(x)
        _run("edm_fake_quantize", x, y, ranges)
        ctx.save_for_backward(x, *ranges)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, *ranges = ctx.saved_tensors
        grad = grads[0].to(x.dtype).contiguous(memory_format=dense_format(x))
        grad_x, grad_scale, grad_qmin = torch.empty_like(x), torch.zeros_like(ranges[0]), torch.zeros_like(ranges[1])
        partial = torch.empty(len(x), -(-_values_of_a_row(x) // FAKE_QUANT_CHUNK), 2)
        sums = {"grad": grad, "partial": partial, "grad_scale": grad_scale, "grad_qmin": grad_qmin}
        _run("edm_fake_quantize_gradients", x, grad_x, ranges, **sums)
        return grad_x, grad_scale, grad_qmin, None


def _values_of_a_row(x: Tensor) -> int:
    return x.numel() // max(len(x), 1)


def _run(kernel: str, x: Tensor, out: Tensor, ranges: tuple[Tensor, ...] | list[Tensor], **others: Tensor) -> None:
    if not x.numel():
        return
    tensors = {"x": x, "out": out, **dict(zip(("scale", "qmin", "levels"), ranges, strict=True)), **others}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    params = FakeQuantParams(**addresses, N=len(x), M=_values_of_a_row(x), type=TYPES[x.dtype])
    threads = min(torch.get_num_threads(), max(1, x.numel() // VALUES_PER_THREAD))
    getattr(library(), kernel)(ctypes.byref(params), threads)
