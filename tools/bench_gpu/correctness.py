"""Stage `kernels` of `bench_gpu`: every kernel, on every tile and with a split sum, compared with the CPU's arithmetic."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from edm_deploy.numerics.kernel_layout import bits_of, pack_codes, pack_weight, weight_sum, zero_codes
from edm_deploy_tools.bench_gpu.attention import attention_results
from edm_deploy_tools.bench_gpu.stage import StageResult, StageRun
from edm_deploy_tools.benchmarks.kernel_problems import BOUNDS
from edm_deploy_tools.common.console import Row
from engines.kernels import build, cuda_ops, driver, rotary, torch_ops
from engines.kernels.checks import FLOATS
from engines.kernels.launch import FIRST_PROLOGUES, PROLOGUES
from engines.kernels.operands import ConvShape, Norm, Operands, RowNorm, Table
from engines.kernels.tiles import TILES

ROWS = 5  # of the tables


def kernels(run: StageRun) -> StageResult:
    """Build the kernels, and compare every one, on every tile and with a split sum, with the CPU's results."""
    facts: dict[str, Any] = {}
    if run.device.type == "cuda":
        start = time.perf_counter()
        for source in build.SOURCES:
            driver.prepare(run.device, source)
        facts["build and load, s"] = round(time.perf_counter() - start, 1)
        facts["compiler"] = str(build.compiler_in_use())
    generator = torch.Generator().manual_seed(0)
    rows = [*_quantizers(run, generator), *_row_norms(run, generator), *_rotations(run, generator)]
    rows += [*_statistics(run, generator), *_convolutions(run, generator)]
    rows += attention_results(run, generator)
    wrong = [f"{row['kernel']}: {row['wrong']} of {row['values']} values differ from the CPU's." for row in rows if not row["ok"]]
    facts["kernels"], facts["correct"] = len(rows), len(rows) - len(wrong)
    return StageResult(facts=facts, tables={"Results of every kernel": rows}, problems=wrong)


def operators_on(device: torch.device) -> Any:  # a module
    """The operators of a device: the kernels, or on the CPU their twins."""
    return cuda_ops if device.type == "cuda" else torch_ops


def activation_table(batch: int, bits: int, *, unsigned: bool, device: torch.device) -> tuple[Any, ...]:
    """Rows, scales and bounds of `quantize`, its bits and whether codes are unsigned."""
    low = -3 if unsigned else -(1 << bits - 1)
    qmin = torch.full((ROWS,), low, dtype=torch.int32, device=device)
    inv_scale = torch.linspace(1.0, 4.0, ROWS, device=device)
    return (torch.arange(batch, dtype=torch.int32, device=device) % ROWS, inv_scale, qmin, qmin + (1 << bits) - 1, bits, unsigned)


def _quantizers(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, (bits, unsigned), last, ((norm, activation), prologue) in itertools.product(
        FLOATS, ((4, False), (4, True), (8, False)), (True, False), PROLOGUES.items()
    ):
        if not last and prologue not in FIRST_PROLOGUES:
            continue
        x = torch.randn((3, 40, 7, 9), generator=generator).to(dtype)
        x = x.to(memory_format=torch.channels_last) if last else x
        groups = Norm(
            *(torch.rand((3, 4), generator=generator) + 0.5 for _ in range(2)), *(torch.randn(40, generator=generator) for _ in range(2))
        )
        table = Table(*activation_table(3, bits, unsigned=unsigned, device=torch.device("cpu")))
        expected_codes = torch_ops.quantize(x, groups if norm else None, table, activation=activation)
        op = operators_on(run.device).quantize
        moved = Norm(*(column.to(run.device) if column is not None else None for column in vars(groups).values()))
        own_table = Table(*activation_table(3, bits, unsigned=unsigned, device=run.device))
        codes = op(x.to(run.device), moved if norm else None, own_table, activation=activation)
        name = f"quantize {'last' if last else 'first'} {_name(dtype)} {'u' if unsigned else 's'}{bits} {prologue}"
        # Where an exponential is approximated, a code may fall to the other side of a rounding tie.
        rows.append(_compared(name, codes.cpu(), expected_codes, share=0.005 if activation in ("silu", "gelu_tanh") else 0.0))
    return rows


def _row_norms(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, (bits, unsigned), (channels, rms) in itertools.product(
        FLOATS, ((4, False), (4, True), (8, False)), ((320, False), (1100, True), (3072, False))
    ):
        x = (torch.randn((3, 9, channels), generator=generator) + 5).to(dtype)
        gamma, beta = torch.randn((2, channels), generator=generator)
        scale, shift = torch.randn((3, 2 * channels), generator=generator).to(dtype).chunk(2, dim=1)
        norm = RowNorm(gamma, beta, scale, shift, 1e-5, rms)
        on = RowNorm(*(value.to(run.device) if isinstance(value, Tensor) else value for value in vars(norm).values()))
        table, own_table = (
            Table(*activation_table(3, bits, unsigned=unsigned, device=device)) for device in (torch.device("cpu"), run.device)
        )
        codes = operators_on(run.device).quantize_rows(x.to(run.device), on, own_table)
        name = f"quantize {'RMSNorm' if rms else 'LayerNorm'} {channels} {_name(dtype)} {'u' if unsigned else 's'}{bits}"
        rows.append(_compared(name, codes.cpu(), torch_ops.quantize_rows(x, norm, table)))
    return rows


def _rotations(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, width in itertools.product(FLOATS, (24, 128)):
        x, angles = torch.randn((2, 9, 3, width), generator=generator).to(dtype), torch.randn((2, 9, width), generator=generator)
        found = rotary_on(run.device)(*(each.to(run.device) for each in (x, *angles)))
        rows.append(_compared(f"rotary {width} {_name(dtype)}", found.cpu().view(torch.int16), rotary.on_cpu(x, *angles).view(torch.int16)))
    return rows


def rotary_on(device: torch.device) -> Any:
    """The rotation of a device: the kernel, or on the CPU its twin."""
    return rotary.on_cuda if device.type == "cuda" else rotary.on_cpu


def _statistics(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, (channels, groups), size in itertools.product(FLOATS, ((64, 8), (320, 32), (600, 2)), (4, 33)):
        x = (torch.randn((2, channels, size, size), generator=generator) * 2 + 5).to(dtype).to(memory_format=torch.channels_last)
        op = operators_on(run.device).group_stats
        found = torch.cat([value.cpu() for value in op(x.to(run.device), groups, 1e-5)])
        right = torch.cat(torch_ops.group_stats(x, groups, 1e-5))
        wrong = int(((found - right).abs() > 1e-5 * right.abs()).sum())
        rows.append(
            {
                "kernel": f"group_stats {_name(dtype)} {channels}/{groups} {size}x{size}",
                "values": right.numel(),
                "wrong": wrong,
                "ok": wrong == 0,
            }
        )
    return rows


def _convolutions(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    shape = ConvShape(N=2, H=9, W=9, Cb=0, K=72, R=3, S=3, P=9, Q=9, padding=1, stride=1)
    for kind, dtype, tile, splits in itertools.product(BOUNDS, FLOATS, TILES, (1, 3)):
        operands = _operands(kind, dtype, shape, generator)
        own = ConvShape(**{**vars(shape), "Cb": operands.codes.shape[-1]})
        right = torch_ops.convolve(operands, own, dtype)
        on = Operands(*(value.to(run.device) if isinstance(value, Tensor) else value for value in vars(operands).values()))
        found = operators_on(run.device).convolve(on, own, dtype, on=(tile, splits))
        name = f"conv {kind} {tile.name} {_name(dtype)}" + (f", {splits} splits" if splits > 1 else "")
        rows.append(_compared(name, found.cpu().view(torch.int16), right.view(torch.int16)))
    return rows


def _operands(kind: str, dtype: torch.dtype, shape: ConvShape, generator: torch.Generator) -> Operands:
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


def _compared(name: str, found: Tensor, right: Tensor, share: float = 0.0) -> Row:
    wrong = int((found != right).sum())
    return {"kernel": name, "values": right.numel(), "wrong": wrong, "ok": wrong <= share * right.numel()}


def _name(dtype: torch.dtype) -> str:
    return cuda_ops.TYPE_NAMES[dtype]
