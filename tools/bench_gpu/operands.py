"""What the stages of `bench_gpu` compute: random operands of kernels, and rows of results."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from edm_deploy.numerics.kernel_layout import bits_of, pack_codes, pack_weight, weight_sum, zero_codes
from edm_deploy_tools.benchmarks.kernel_problems import BOUNDS
from edm_deploy_tools.common.console import Row
from engines.kernels import cuda_ops, torch_ops
from engines.kernels.operands import ConvShape, Operands

ROWS = 5  # of the tables
KINDS = ((4, False), (4, True), (8, False))  # bits of codes, and whether they are unsigned


def operators_on(device: torch.device) -> Any:  # a module
    """The operators of a device: the kernels, or on the CPU their twins."""
    return cuda_ops if device.type == "cuda" else torch_ops


def activation_table(batch: int, bits: int, *, unsigned: bool, device: torch.device) -> tuple[Any, ...]:
    """Rows, scales and bounds of `quantize`, its bits and whether codes are unsigned."""
    low = -3 if unsigned else -(1 << bits - 1)
    qmin = torch.full((ROWS,), low, dtype=torch.int32, device=device)
    inv_scale = torch.linspace(1.0, 4.0, ROWS, device=device)
    return (torch.arange(batch, dtype=torch.int32, device=device) % ROWS, inv_scale, qmin, qmin + (1 << bits) - 1, bits, unsigned)


def convolution_operands(kind: str, dtype: torch.dtype, shape: ConvShape, generator: torch.Generator) -> Operands:
    """Operands of a 3x3 convolution of 40 channels with every operand of the epilogue but a branch."""
    bits, (low, high), channels = bits_of(kind), BOUNDS[kind], 40
    qmin = torch.full((ROWS,), low, dtype=torch.int32)
    codes = torch.randint(low, high + 1, (shape.N, shape.H, shape.W, channels), generator=generator, dtype=torch.int32)
    limit = 1 << bits - 1
    weight = torch.randint(-limit, limit, (shape.K, channels, 3, 3), generator=generator).to(torch.int8)
    return Operands(
        codes=pack_codes((codes - low if kind == "u4" else codes).to(torch.int8), bits),
        rows=torch.tensor([1, 4], dtype=torch.int32),
        weight=pack_weight(weight, bits),
        zero=zero_codes(qmin, bits, unsigned=kind == "u4"),
        act_scale=torch.linspace(0.01, 0.1, ROWS),
        qmin=qmin,
        weight_scale=torch.linspace(1e-3, 1e-2, shape.K),
        weight_sum=weight_sum(weight),
        bias=torch.randn(shape.K, generator=generator),
        sample_bias=torch.randn((shape.N, shape.K), generator=generator).to(dtype),
        gate=torch.randn((shape.N, shape.K), generator=generator).to(dtype),
        residual=torch.randn((shape.M, shape.K), generator=generator).to(dtype),
        low=None,
        up=None,
        saturate=True,
        kind=kind,
    )


def compared(name: str, found: Tensor, right: Tensor, share: float = 0.0) -> Row:
    """A row of the results: how many values differ, and whether at most a share of them does."""
    wrong = int((found != right).sum())
    return {"kernel": name, "values": right.numel(), "wrong": wrong, "ok": wrong <= share * right.numel()}


def name_of(dtype: torch.dtype) -> str:
    """As entry points name it."""
    return cuda_ops.TYPE_NAMES[dtype]
