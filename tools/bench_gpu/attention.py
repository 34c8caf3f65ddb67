"""Attention in `bench_gpu`: the kernels of every head dimension compared with the CPU's arithmetic, and their time beside torch's."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edm_deploy_tools.bench_gpu.stage import StageRun
from edm_deploy_tools.common.console import Row
from engines.kernels.attention import cpu, cuda
from engines.kernels.attention.launch import WIDTHS
from engines.kernels.attention.operands import AttentionOperands
from engines.kernels.checks import FLOATS
from engines.performance.attention_time import attention_s8_seconds, attention_seconds

OPS = torch.ops.edm_deploy
# Batch, heads, tokens, elements of self-attention in SD 1.5 at 512x512, SDXL at 1024x1024, PixArt-alpha at 512x512 and FLUX at 1024x1024.
SHAPES = (
    (2, 8, 4096, 40),
    (2, 8, 1024, 80),
    (2, 8, 256, 160),
    (2, 10, 4096, 64),
    (2, 20, 1024, 64),
    (2, 16, 1024, 72),
    (1, 24, 4608, 128),
)
# Relative error to the CPU's: powers and the result are rounded to the type, and sums have another order.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def attention_on(device: torch.device) -> Any:  # a module
    """The kernels on a GPU, on the CPU their twin."""
    return cuda if device.type == "cuda" else cpu


def attention_results(run: StageRun, generator: torch.Generator) -> list[Row]:
    """A row for each width, type and number of keys, with the share of values beyond rounding."""
    rows = []
    for width, dtype, (length, keys) in itertools.product(WIDTHS, FLOATS, ((70, 70), (40, 150))):
        views = [torch.randn((2, tokens, 2 * (width.elements - 8)), generator=generator).to(dtype) for tokens in (length, keys, keys)]
        query, key, value = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in views)
        right = cpu.attention(AttentionOperands(query, key, value, None)).float()
        found = attention_on(run.device).attention(AttentionOperands(*(x.to(run.device) for x in (query, key, value)), None)).float().cpu()
        # A code of a key at a rounding tie moves the weights of one head by less than 1 %: a single value may be off by that.
        wrong = int(((found - right).abs() > 0.01 * right.abs().max()).sum() + found.isnan().sum())
        close = float((found - right).norm()) <= ROUNDING[dtype] * float(right.norm())
        name = f"attention {width.elements} {str(dtype).removeprefix('torch.')} {length}x{keys}"
        rows.append(
            {"kernel": name, "values": right.numel(), "wrong": wrong if wrong or close else right.numel(), "ok": close and not wrong}
        )
    return rows


@torch.no_grad()
def attention_times(run: StageRun) -> list[Row]:
    """For each shape torch's attention in float16, ours, and the ratio; expected times beside both where the GPU's figures are known."""
    rows: list[Row] = []
    for shape in ((1, 2, 64, 40),) if run.small else SHAPES:
        heads = [_heads(shape, run.device) for _ in range(3)]
        torchs = run.seconds(lambda heads=heads: functional.scaled_dot_product_attention(*heads))
        ours = run.seconds(lambda heads=heads: OPS.attention_s8(*heads, None))
        error = _error(heads)
        row: Row = {"heads": str(list(shape)), "torch us": round(1e6 * torchs, 1), "int8 us": round(1e6 * ours, 1)}
        row |= {"times torch's speed": round(torchs / ours, 2), "relative error": float(f"{error:.1e}")}
        if run.gpu is not None:
            expected = attention_seconds(shape, shape, run.gpu), attention_s8_seconds(shape, shape, run.gpu)
            row |= {"torch expected us": round(1e6 * expected[0], 1), "int8 expected us": round(1e6 * expected[1], 1)}
            row |= {"torch of expected": round(torchs / expected[0], 2), "int8 of expected": round(ours / expected[1], 2)}
        rows.append(row)
    return rows


def _heads(shape: tuple[int, int, int, int], device: torch.device) -> Tensor:
    batch, heads, tokens, width = shape
    return torch.randn(batch, tokens, heads, width, device=device).half().transpose(1, 2)


def _error(heads: list[Tensor]) -> float:
    exact = functional.scaled_dot_product_attention(*(x[:, :1].float() for x in heads))
    found = OPS.attention_s8(*(x[:, :1] for x in heads), None).float()
    return float((found - exact).norm() / exact.norm())
