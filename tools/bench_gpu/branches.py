"""Stage `kernels` of `bench_gpu`: quantizers that rotate, and low-rank branches, compared with the CPU's arithmetic."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from edm_deploy_tools.bench_gpu.operands import KINDS, activation_table, compared, convolution_operands, name_of, operators_on
from edm_deploy_tools.bench_gpu.stage import StageRun
from edm_deploy_tools.common.console import Row
from engines.kernels import quantize_branch, torch_ops
from engines.kernels.checks import FLOATS
from engines.kernels.launch import BRANCH_PROLOGUES, PROLOGUES, ROTATED_PROLOGUES
from engines.kernels.operands import ConvShape, RowNorm, Table
from engines.kernels.tiles import TILES

APPROXIMATED = ("silu", "gelu_tanh")  # by an exponential whose last bits differ: a code may fall to the other side of a rounding tie
ACTIVATION_OF = {prologue: activation for (_, activation), prologue in PROLOGUES.items()}
NORMS = {"norm": "group", "norm_silu": "group", "rows": "layer"}


def branch_on(device: torch.device) -> Any:
    """The operator `quantize_branch` of a device."""
    return quantize_branch.on_cuda if device.type == "cuda" else quantize_branch.on_cpu


def rotated_results(run: StageRun, generator: torch.Generator) -> list[Row]:
    """Every quantizer that rotates."""
    rows = []
    for dtype, (bits, unsigned), prologue in itertools.product(FLOATS, KINDS, (*ROTATED_PROLOGUES, "rows")):
        width = 640 if prologue == "geglu" else 320
        x = torch.randn((3, 9, width), generator=generator).to(dtype)
        table, own = (Table(*activation_table(3, bits, unsigned=unsigned, device=device)) for device in (torch.device("cpu"), run.device))
        if prologue == "rows":
            norm, moved = (RowNorm(*[None] * 4, 1e-5, rms=False),) * 2
            right = torch_ops.quantize_rows(x, norm, table, rotation=64)
            found = operators_on(run.device).quantize_rows(x.to(run.device), moved, own, rotation=64)
        else:
            behind = {"activation": ACTIVATION_OF[prologue], "rotation": 64}
            right = torch_ops.quantize(x, None, table, **behind)
            found = operators_on(run.device).quantize(x.to(run.device), None, own, **behind)
        name = f"quantize {name_of(dtype)} {'u' if unsigned else 's'}{bits} {prologue}, rotated"
        rows.append(compared(name, found.cpu(), right, share=0.005 if prologue in APPROXIMATED else 0.0))
    return rows


def branch_results(run: StageRun, generator: torch.Generator) -> list[Row]:
    """Every convolution with a branch in its epilogue, of powers of two, so that its sum is exact in any order."""
    rows = []
    shape = ConvShape(N=2, H=9, W=9, Cb=0, K=72, R=3, S=3, P=9, Q=9, padding=1, stride=1)
    for kind, dtype, tile, splits in itertools.product(("s4", "u4", "s8"), FLOATS, TILES, (1, 3)):
        operands = convolution_operands(kind, dtype, shape, generator)
        low, up = (torch.randint(-4, 5, (count, 40), generator=generator).to(dtype) / 64 for count in (shape.M, shape.K))
        exact = {name: torch.exp2(torch.log2(getattr(operands, name)).round()) for name in ("act_scale", "weight_scale")}
        operands = replace(operands, low=low, up=up, **exact)
        own = replace(shape, Cb=operands.codes.shape[-1])
        right = torch_ops.convolve(operands, own, dtype)
        on = replace(operands, **{name: value.to(run.device) for name, value in vars(operands).items() if isinstance(value, Tensor)})
        found = operators_on(run.device).convolve(on, own, dtype, on=(tile, splits))
        name = f"conv {kind} {tile.name} {name_of(dtype)}, branch" + (f", {splits} splits" if splits > 1 else "")
        rows.append(compared(name, found.cpu().view(torch.int16), right.view(torch.int16)))
    return rows


def down_results(run: StageRun, generator: torch.Generator) -> list[Row]:
    """Every quantizer with a branch's first product: its codes, and the product within the rounding of its type."""
    rows = []
    for dtype, (bits, unsigned), prologue in itertools.product(FLOATS, KINDS, BRANCH_PROLOGUES):
        x = torch.randn((3, 40, 640 if prologue == "geglu" else 320), generator=generator).to(dtype)
        norm = NORMS.get(prologue, "none")
        statistics = (
            (torch.randn((3, 4), generator=generator), torch.rand((3, 4), generator=generator) + 0.5) if norm == "group" else (None, None)
        )
        down, low_scale = torch.randn((72, 320), generator=generator).to(dtype), torch.rand((3, 72), generator=generator).to(dtype)
        rotation, activation, groups = 0 if norm == "group" else 64, ACTIVATION_OF.get(prologue, "none"), 4 if norm == "group" else 0
        operands = quantize_branch.BranchOperands(
            activation, rotation, down, low_scale, prologue in ("plain", "rows"), norm, *statistics, *[None] * 4, groups, 1e-5
        )
        table, own = (Table(*activation_table(3, bits, unsigned=unsigned, device=device)) for device in (torch.device("cpu"), run.device))
        moved = replace(operands, **{name: value.to(run.device) for name, value in vars(operands).items() if isinstance(value, Tensor)})
        codes, low = quantize_branch.on_cpu(x, operands, table)
        found_codes, found_low = (each.cpu() for each in branch_on(run.device)(x.to(run.device), moved, own))
        name = f"quantize {name_of(dtype)} {'u' if unsigned else 's'}{bits} {prologue}, times a branch"
        rows.append(compared(name, found_codes, codes, share=0.005 if "silu" in prologue or prologue in APPROXIMATED else 0.0))
        near = (found_low.float() - low.float()).abs() <= 4 * torch.finfo(dtype).eps * low.float().abs().max()
        rows.append(compared(f"{name}: product", near, torch.ones_like(near)))
    return rows
