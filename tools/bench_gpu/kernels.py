"""Stages of `bench_gpu` that need neither a model nor diffusers: versions, compute-sanitizer, times of operators and layers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from edm_deploy.errors import first_line
from edm_deploy_tools.bench_gpu.attention import attention_times
from edm_deploy_tools.bench_gpu.operands import activation_table
from edm_deploy_tools.bench_gpu.stage import StageResult, StageRun
from edm_deploy_tools.benchmarks.comfy_kitchen import comfy_kitchen_calls
from edm_deploy_tools.benchmarks.kernel_problems import Call, Problem, fits_int_mm, float_call, int_mm_call
from edm_deploy_tools.benchmarks.layer_shapes import LAYERS, Layer
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.machine import measurement_conditions
from engines.performance.gpus import launch_seconds
from engines.performance.roofline import Matmul, Precision, expected, others

OPS = torch.ops.edm_deploy
PEERS = ("comfy_kitchen", "nunchaku", "sageattention", "flash_attn", "triton")
NVIDIA_SMI = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
SANITIZERS = ("memcheck", "racecheck")
MAPS = ((2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16))  # of SD 1.5


def versions(run: StageRun) -> StageResult:
    """Versions, GPU, clocks, and what is installed beside us."""
    facts = measurement_conditions() | {"cuda of torch": torch.version.cuda, "device": str(run.device)}
    if run.device.type == "cuda":
        properties = torch.cuda.get_device_properties(run.device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["multiprocessors"] = properties.multi_processor_count
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # untyped in torch
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={','.join(NVIDIA_SMI)}", "--format=csv,noheader"]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        facts |= dict(zip(NVIDIA_SMI, ran.stdout.strip().splitlines()[:1][0].split(", "), strict=False)) if ran.returncode == 0 else {}
    facts |= {tool: shutil.which(tool) or "not installed" for tool in ("nvcc", "compute-sanitizer", "ncu", "nsys")}
    facts |= {name: importlib.metadata.version(name.replace("_", "-")) for name in PEERS if importlib.util.find_spec(name)}
    return StageResult(facts=facts)


def sanitizer(run: StageRun) -> StageResult:
    """NVIDIA's compute-sanitizer over the stage `kernels`: memory errors and races of shared memory."""
    path = shutil.which("compute-sanitizer")
    if path is None or run.device.type != "cuda":
        return StageResult(facts={"compute-sanitizer": "not installed" if path is None else "needs a GPU"})
    facts, problems = {}, []
    for tool in SANITIZERS:
        command = [
            path,
            "--tool",
            tool,
            "--print-limit",
            "5",
            sys.executable,
            "-m",
            "edm_deploy_tools.bench_gpu",
            "--stage",
            "kernels",
            "--small",
        ]
        try:
            ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            facts[tool] = "not finished after 60 s"
            continue
        lines = [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith("=========")]
        facts[tool] = next((line.strip("= ") for line in lines if "ERROR SUMMARY" in line or "SUMMARY" in line), "no summary")
        if "0 errors" not in facts[tool] and "0 hazards" not in facts[tool]:
            problems.append(f"compute-sanitizer {tool}: {facts[tool]}; first {lines[1].strip('= ') if len(lines) > 1 else ''}.")
    return StageResult(facts=facts, problems=problems)


@torch.no_grad()
def operators(run: StageRun) -> StageResult:
    """Time of what is bound by memory, and of attention at its head dimensions, beside torch's."""
    rows: list[Row] = []
    for shape in ((2, 64, 8, 8),) if run.small else MAPS:
        rows += _map_operators(run, shape)
    return StageResult(tables={"Operators": rows, "Attention": attention_times(run)})


def _map_operators(run: StageRun, shape: tuple[int, ...]) -> list[Row]:
    """Norms, quantizers and activations of one map. The numbers beside the calls: bytes moved for each value, and kernels."""
    x = torch.randn(shape, device=run.device).half().to(memory_format=torch.channels_last)
    table = activation_table(shape[0], 4, unsigned=False, device=run.device)
    columns = torch.ones(shape[1], device=run.device), torch.zeros(shape[1], device=run.device)
    half = [column.half() for column in columns]
    mean, rstd = OPS.group_stats(x, 32, 1e-5)
    first, tokens = x.contiguous(memory_format=torch.contiguous_format), x.flatten(2).transpose(1, 2).contiguous()
    gate = torch.cat([tokens, tokens], -1)
    calls: tuple[tuple[str, Call, float, int], ...] = (
        ("group_stats", lambda: OPS.group_stats(x, 32, 1e-5), 2, 2),
        ("quantize_normed, SiLU", lambda: OPS.quantize_normed(x, mean, rstd, *columns, 32, *table, "silu"), 2.5, 1),
        ("quantize, channels last", lambda: OPS.quantize(x, *table, "none", 0), 2.5, 1),
        ("quantize, channels first", lambda: OPS.quantize(first, *table, "none", 0), 2.5, 1),
        ("quantize behind LayerNorm", lambda: OPS.quantize_row_normed(tokens, *columns, None, None, 1e-5, False, *table, 0), 2.5, 1),
        ("quantize behind GEGLU", lambda: OPS.quantize(gate, *table, "geglu", 0), 4.5, 1),
        ("torch: group_norm, SiLU", lambda: functional.silu(functional.group_norm(x, 32, *half)), 10, 3),
        ("torch: layer_norm", lambda: functional.layer_norm(tokens, tokens.shape[-1:], *half), 4, 1),
        ("torch: GEGLU", lambda: gate.chunk(2, -1)[0] * functional.gelu(gate.chunk(2, -1)[1]), 10, 2),
    )
    launch = launch_seconds(graph=True)
    rows = []
    for name, call, size, launches in calls:
        moved = _moved(run, size * x.numel())
        rows.append(_timed(run, f"{name} {list(shape)}", call, None if moved is None else moved + launches * launch))
    return rows


@torch.no_grad()
def layers(run: StageRun) -> StageResult:
    """Convolutions and linears of SD 1.5, SDXL and FLUX: ours, torch's float16, torch's INT8 matmul, comfy-kitchen's, and what the roofline expects."""
    tables: dict[str, list[Row]] = {}
    points: list[dict[str, Any]] = []
    torch.backends.cudnn.benchmark = True
    models: dict[str, tuple[int, Sequence[Layer]]] = {
        name: (batch, LAYERS[name][:14]) for name, batch in (("sd15", 2), ("sdxl", 2), ("flux1-schnell", 1))
    }
    if run.small:
        models = {"small": (2, (Layer("conv", 32, 32, 8, 8, 3, 1, 1), Layer("linear", 256, 32, 24, 1, 1, 1, 1)))}
    problems: list[str] = []
    for model, (batch, shapes) in models.items():
        rows: list[Row] = []
        for layer in shapes:
            rows.append(_layer_row(run, batch, layer, points) | _peers(run, batch, layer, problems))
        tables[f"Layers of {model}, batch {batch}"] = rows
    return StageResult(tables=tables, points=points, problems=problems)


def _peers(run: StageRun, batch: int, layer: Layer, problems: list[str]) -> Row:
    row: Row = {}
    try:
        for name, call in comfy_kitchen_calls(layer, batch, run.device).items():
            row[f"comfy-kitchen {name} with quantize us"] = round(1e6 * run.seconds(call), 1)
    except Exception as err:  # another package's, of any version, on any GPU
        problems.append(f"comfy-kitchen, {layer}: {type(err).__name__}: {first_line(err)}")
    return row


def _layer_row(run: StageRun, batch: int, layer: Layer, points: list[dict[str, Any]]) -> Row:
    matmul = Matmul(rows=batch * layer.P * layer.Q, channels=layer.C, taps=layer.R**2, outputs=layer.K, inputs=batch * layer.H * layer.W)
    row: Row = {"layer": str(layer), "uses": layer.uses}
    measured: dict[Precision, Callable[[], Call]] = {
        "float16": lambda: float_call(layer, batch, run.device),
        "int8": lambda: Problem(layer, batch, "s8", run.device).sum,
    }
    if run.gpu is None or run.gpu.has_int4:
        measured["int4"] = lambda: Problem(layer, batch, "s4", run.device).sum
    for precision, make in measured.items():
        seconds = run.seconds(make())
        row[f"{precision} us"] = round(1e6 * seconds, 1)
        if run.gpu is not None:
            model = expected(matmul, precision, run.gpu, quantize=False) if precision != "float16" else others(matmul, "float16", run.gpu)
            row[f"{precision} of expected"] = round(seconds / model.seconds, 2)
            shape = {"rows": matmul.rows, "channels": layer.C, "taps": layer.R**2, "outputs": layer.K}
            points.append({"precision": precision, "shape": shape, "seconds": seconds, "expected": model.seconds})
    if fits_int_mm(layer, batch) and run.device.type == "cuda":
        row["torch._int_mm us"] = round(1e6 * run.seconds(int_mm_call(layer, batch, run.device)), 1)
    quantize = run.seconds(Problem(layer, batch, "s8" if "int4" not in measured else "s4", run.device).quantize)
    fastest = min(float(row[f"{precision} us"]) for precision in measured if precision != "float16")
    row["quantize us"] = round(1e6 * quantize, 1)
    row["ours with quantize, over float16"] = round(float(row["float16 us"]) / (fastest + 1e6 * quantize), 2)
    return row


def _timed(run: StageRun, name: str, call: Call, expected_seconds: float | None) -> Row:
    seconds = run.seconds(call)
    row: Row = {"operator": name, "us": round(1e6 * seconds, 1)}
    if expected_seconds is not None:
        row |= {"expected us": round(1e6 * expected_seconds, 1), "of expected": round(seconds / expected_seconds, 2)}
    return row


def _moved(run: StageRun, size: float) -> float | None:
    if run.gpu is None:
        return None
    return size / (run.gpu.l2 if size <= run.gpu.l2_size / 2 else run.gpu.dram)
