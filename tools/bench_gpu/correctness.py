"""Stage `kernels` of `bench_gpu`: every kernel, on every tile and with a split sum, compared with the CPU's arithmetic."""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from torch import Tensor

from edm_deploy_tools.bench_gpu.attention import attention_results
from edm_deploy_tools.bench_gpu.branches import branch_results, down_results, rotated_results
from edm_deploy_tools.bench_gpu.operands import KINDS, activation_table, compared, convolution_operands, name_of, operators_on
from edm_deploy_tools.bench_gpu.stage import StageResult, StageRun
from edm_deploy_tools.benchmarks.kernel_problems import BOUNDS
from edm_deploy_tools.common.console import Row
from engines.kernels import build, driver, rotary, torch_ops
from engines.kernels.checks import FLOATS
from engines.kernels.launch import FIRST_PROLOGUES, PROLOGUES
from engines.kernels.operands import ConvShape, Norm, Operands, RowNorm, Table
from engines.kernels.tiles import TILES


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
    rows += [*rotated_results(run, generator), *branch_results(run, generator), *down_results(run, generator)]
    rows += attention_results(run, generator)
    wrong = [f"{row['kernel']}: {row['wrong']} of {row['values']} values differ from the CPU's." for row in rows if not row["ok"]]
    facts["kernels"], facts["correct"] = len(rows), len(rows) - len(wrong)
    return StageResult(facts=facts, tables={"Results of every kernel": rows}, problems=wrong)


def _quantizers(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, (bits, unsigned), last, ((norm, activation), prologue) in itertools.product(FLOATS, KINDS, (True, False), PROLOGUES.items()):
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
        name = f"quantize {'last' if last else 'first'} {name_of(dtype)} {'u' if unsigned else 's'}{bits} {prologue}"
        # Where an exponential is approximated, a code may fall to the other side of a rounding tie.
        rows.append(compared(name, codes.cpu(), expected_codes, share=0.005 if activation in ("silu", "gelu_tanh") else 0.0))
    return rows


def _row_norms(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, (bits, unsigned), (channels, rms) in itertools.product(FLOATS, KINDS, ((320, False), (1100, True), (3072, False))):
        x = (torch.randn((3, 9, channels), generator=generator) + 5).to(dtype)
        gamma, beta = torch.randn((2, channels), generator=generator)
        scale, shift = torch.randn((3, 2 * channels), generator=generator).to(dtype).chunk(2, dim=1)
        norm = RowNorm(gamma, beta, scale, shift, 1e-5, rms)
        on = RowNorm(*(value.to(run.device) if isinstance(value, Tensor) else value for value in vars(norm).values()))
        table, own_table = (
            Table(*activation_table(3, bits, unsigned=unsigned, device=device)) for device in (torch.device("cpu"), run.device)
        )
        codes = operators_on(run.device).quantize_rows(x.to(run.device), on, own_table)
        name = f"quantize {'RMSNorm' if rms else 'LayerNorm'} {channels} {name_of(dtype)} {'u' if unsigned else 's'}{bits}"
        rows.append(compared(name, codes.cpu(), torch_ops.quantize_rows(x, norm, table)))
    return rows


def _rotations(run: StageRun, generator: torch.Generator) -> list[Row]:
    rows = []
    for dtype, width in itertools.product(FLOATS, (24, 128)):
        x, angles = torch.randn((2, 9, 3, width), generator=generator).to(dtype), torch.randn((2, 9, width), generator=generator)
        found = rotary_on(run.device)(*(each.to(run.device) for each in (x, *angles)))
        rows.append(
            compared(f"rotary {width} {name_of(dtype)}", found.cpu().view(torch.int16), rotary.on_cpu(x, *angles).view(torch.int16))
        )
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
                "kernel": f"group_stats {name_of(dtype)} {channels}/{groups} {size}x{size}",
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
        operands = convolution_operands(kind, dtype, shape, generator)
        own = ConvShape(**{**vars(shape), "Cb": operands.codes.shape[-1]})
        right = torch_ops.convolve(operands, own, dtype)
        on = Operands(*(value.to(run.device) if isinstance(value, Tensor) else value for value in vars(operands).values()))
        found = operators_on(run.device).convolve(on, own, dtype, on=(tile, splits))
        name = f"conv {kind} {tile.name} {name_of(dtype)}" + (f", {splits} splits" if splits > 1 else "")
        rows.append(compared(name, found.cpu().view(torch.int16), right.view(torch.int16)))
    return rows
