"""Check our kernels bit for bit on this machine's GPU, then time them against torch's float16 layers and its INT8 matmul.

    python -m edm_deploy_tools.bench_kernels --model sd15 --batch 2,8,16

Each time is the median over replays of a CUDA graph that calls one operator repeatedly, divided by the number of calls, so it contains no host time. With
`--l2 cold` the calls cycle over copies of their operands with three times the size of L2, as in a network whose other layers run in between; with `--l2 warm`
they share one copy. float16 is torch's implementation, channels last, with cuDNN's benchmark mode.
"""

from __future__ import annotations

import math
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Annotated, Any

import torch
import typer

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy_tools.benchmarks.kernel_problems import (
    BOUNDS,
    CALLS,
    Call,
    Problem,
    copy_bandwidth,
    fits_int_mm,
    float_call,
    graph_seconds,
    int_mm_call,
)
from edm_deploy_tools.benchmarks.layer_shapes import BATCHES, LAYERS, Layer
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.machine import measurement_conditions
from engines.kernels import build, driver

COPIES = 64  # of an operator's operands, at most
LEAST_REPLAYS = 30
NO_INT4 = (9, 0)  # from this compute capability on, 4-bit products are emulated, so that their time is not meaningful


class L2(StrEnum):
    """Whether operands may be in L2 when an operator starts."""

    COLD = "cold"
    WARM = "warm"


@dataclass(frozen=True)
class LayerTiming:
    """Times of one layer at one batch size, whose results are correct bit for bit; in microseconds, None if not measured.

    Attributes:
        model, batch, layer, uses: The measured layer, and how often a step of the model runs it.
        float16: torch's convolution or matmul.
        int_mm: `torch._int_mm` without scale and bias, with an int32 result.
        int8, int4: Our kernels, from codes to float16; int4 only on GPUs with 4-bit tensor cores.
        quantize8, quantize4: Our quantization from float16 to codes.
        quantize_share: Bandwidth of the 8-bit quantization as a share of that of a copy.
    """

    model: str
    batch: int
    layer: str
    uses: int
    float16: float
    int_mm: float | None
    int8: float
    int4: float | None
    quantize8: float
    quantize4: float
    quantize_share: float

    @property
    def speedup(self) -> float:
        """Time of float16 over time of int8, without quantization, which other layers may share."""
        return self.float16 / self.int8

    @property
    def speedup_with_quantize(self) -> float:
        """Time of float16 over time of int8 with its quantization."""
        return self.float16 / (self.int8 + self.quantize8)


def bench(layers: Sequence[tuple[str, int, Layer]], *, l2: L2, replays: int) -> tuple[float, list[LayerTiming]]:
    """Bandwidth of a copy in bytes per second, and the times of each (model, batch, layer).

    Raises:
        UnsupportedError: The kernels cannot run here, or their results differ from the CPU's.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    driver.prepare(device)
    torch.backends.cudnn.benchmark = True
    bandwidth = copy_bandwidth(device, replays)
    return bandwidth, [bench_layer(*each, device, bandwidth, l2, replays) for each in layers]


@torch.no_grad()
def bench_layer(model: str, batch: int, layer: Layer, device: torch.device, bandwidth: float, l2: L2, replays: int) -> LayerTiming:
    """Check and time one layer; see `bench`."""
    for kind in BOUNDS:
        Problem(layer, batch, kind, device).check(f"{model}, batch {batch}, {layer}, {kind}")
    first = {kind: Problem(layer, batch, kind, device) for kind in ("s8", "s4")}
    half_bytes = 2 * (batch * layer.C * layer.H * layer.W + layer.C * layer.K * layer.R**2)
    capacity = 3 * torch.cuda.get_device_properties(device).L2_cache_size if l2 == L2.COLD else 0

    def timed(make: Callable[[], Call], size: int) -> float:
        copies = min(COPIES, max(1, math.ceil(capacity / size)))
        return graph_seconds([make() for _ in range(copies)], replays) * 1e6

    def ours(call: str, kind: str, size: int) -> float:
        return timed(lambda: getattr(Problem(layer, batch, kind, device), call), size)

    quantize8 = ours("quantize", "s8", first["s8"].quantize_bytes)
    return LayerTiming(
        model=model,
        batch=batch,
        layer=str(layer),
        uses=layer.uses,
        float16=timed(lambda: float_call(layer, batch, device), half_bytes),
        int_mm=timed(lambda: int_mm_call(layer, batch, device), half_bytes // 2) if fits_int_mm(layer, batch) else None,
        int8=ours("sum", "s8", first["s8"].sum_bytes),
        int4=ours("sum", "s4", first["s4"].sum_bytes) if torch.cuda.get_device_capability(device) < NO_INT4 else None,
        quantize8=quantize8,
        quantize4=ours("quantize", "s4", first["s4"].quantize_bytes),
        quantize_share=first["s8"].quantize_bytes / (quantize8 * 1e-6) / bandwidth,
    )


def summary(rows: Sequence[LayerTiming]) -> list[dict[str, Any]]:
    """For each model and batch: number of layers, median speedups over float16 (of INT8 unless named INT4), the slowest INT8 layer, and the median bandwidth share."""
    groups: dict[tuple[str, int], list[LayerTiming]] = {}
    for row in rows:
        groups.setdefault((row.model, row.batch), []).append(row)
    summaries = []
    for (model, batch), group in groups.items():
        slowest = min(group, key=lambda row: row.speedup)
        step16 = sum(row.uses * row.float16 for row in group)
        step8 = sum(row.uses * (row.int8 + row.quantize8) for row in group)
        summaries.append(
            {
                "model": model,
                "batch": batch,
                "layers": len(group),
                "median speedup": statistics.median(row.speedup for row in group),
                "with quantize": statistics.median(row.speedup_with_quantize for row in group),
                "INT4": statistics.median(row.float16 / row.int4 for row in group if row.int4) if group[0].int4 else None,
                "all uses, with quantize": step16 / step8,
                "slowest": f"{slowest.speedup:.2f} {slowest.layer}",
                "quantize, of copy": statistics.median(row.quantize_share for row in group),
            }
        )
    return summaries


def conditions(l2: L2, replays: int) -> dict[str, Any]:
    """The conditions that are stated with every figure."""
    return {
        "l2": l2.value,
        "replays": replays,
        "calls": f"{CALLS} or more per replay",
        **gpu_state(),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]  # untyped in torch
        "compiler": str(build.cubin(driver.arch_of(torch.cuda.get_device_capability())).compiler),
        **measurement_conditions(),
    }


def gpu_state() -> dict[str, str]:
    """Driver version, clocks, power limit and temperature from nvidia-smi; empty without nvidia-smi."""
    query = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={','.join(query)}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    return dict(zip(query, ran.stdout.strip().split(", "), strict=False)) if ran.returncode == 0 else {}


def chosen(models: Sequence[str], batches: Sequence[int]) -> list[tuple[str, int, Layer]]:
    """(model, batch, layer) of each layer to measure; without batches, those of the table.

    Raises:
        InputError: A model without a table, or a batch below 1.
    """
    for model in models:
        if model not in LAYERS:
            raise InputError(f"No layers of {model!r} are listed. Known: {', '.join(LAYERS)}.")
    if any(batch < 1 for batch in batches):
        raise InputError(f"--batch {','.join(map(str, batches))}: expected 1 or more.")
    return [(model, batch, layer) for model in models for batch in batches or BATCHES[model] for layer in LAYERS[model]]


def batches_of(text: str) -> list[int]:
    """The numbers of a text such as `2,8`.

    Raises:
        InputError: It contains something else than whole numbers.
    """
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError as err:
        raise InputError(f"--batch {text}: expected whole numbers separated by commas, such as 2,8,16.") from err


app = run_app.app_with()


@app.command()
def command(
    model: Annotated[
        list[str] | None, typer.Option(help=f"Model whose layers are measured: {', '.join(LAYERS)}; repeatable. Default: all.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas. Default: those of each model.")] = "",
    l2: Annotated[L2, typer.Option(help="Whether operands may be in L2 (warm) or not (cold) when an operator starts.")] = L2.COLD,
    replays: Annotated[int, typer.Option(min=LEAST_REPLAYS, help="Number of replays for the median.")] = LEAST_REPLAYS,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Check the kernels bit for bit on this machine's GPU, then time them layer by layer."""
    layers = chosen(model or list(LAYERS), batches_of(batch))
    if reason := driver.available():
        raise UnsupportedError(f"These kernels run on an NVIDIA GPU, and none can be used here. {reason}")
    facts = conditions(l2, replays)
    bandwidth, rows = bench(layers, l2=l2, replays=replays)
    show(facts | {"copy": f"{bandwidth / 1e9:.0f} GB/s"}, rows, as_json=json)


def show(facts: Mapping[str, Any], rows: Sequence[LayerTiming], *, as_json: bool) -> None:
    """Print conditions, summary and the times of each layer."""
    if as_json:
        console.print_json({"conditions": dict(facts), "summary": summary(rows), "rows": [asdict(row) for row in rows]})
        return
    console.print_facts(facts)
    console.print_table("Speedup over float16, by layer", summary(rows))
    console.print_table("Microseconds per call; the results of every row were first checked bit for bit", [words(row) for row in rows])
    if rows[0].int4 is None:
        console.say("This GPU emulates 4-bit products: their results were checked, and their time is not meaningful.")


def words(row: LayerTiming) -> dict[str, Any]:
    """A row of the printed table, with speedups."""
    return asdict(row) | {"quantize_share": f"{row.quantize_share:.0%}", "speedup": row.speedup, "with quantize": row.speedup_with_quantize}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code, 0 or 2."""
    return run_app.run(app, "python -m edm_deploy_tools.bench_kernels", arguments)


if __name__ == "__main__":
    sys.exit(main())
