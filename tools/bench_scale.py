"""Quantize, export and build published architectures at full size, each step in a new process, with its time and peak memory.

python -m edm_deploy_tools.bench_scale --architecture sd15 --bits W4A8 --rows 20 --size 16
python -m edm_deploy_tools.bench_scale --architecture flux1-schnell --layers 2 --rows 4 --size 16 --backends ort,openvino,trt-rtx,cuda
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from edm_deploy_tools.common import console, run_app

app = run_app.app_with()
RESULTS = "results.json"
EXPORT_LIMIT = 1.5  # peak memory of the export over the size of the float16 weights
ARTIFACT_LIMIT = 0.30  # size of a 4-bit artifact over that of the float16 weights
BUILD = "build "  # prefix of the names of the build steps
FROM_ARTIFACT = ("cuda", "cpu")
FOR_A_GPU = ("trt-rtx", "cuda")
DTYPES = {"trt-rtx": "fp16", "trt": "fp16"}  # dtype of the graph that a backend is built from; the others take float32


@dataclass(frozen=True)
class Limit:
    """Limit of calibration, export and build for one GPU together, on two cores: wall time in seconds, peak memory in bytes."""

    seconds: float
    peak_bytes: float


LIMITS: Mapping[str, Limit] = {"sd15": Limit(300, 8e9), "sdxl": Limit(900, 18e9)}


@dataclass(frozen=True, kw_only=True)
class CommandStep:
    """A command: its name in the table, its arguments, and the directory that it writes."""

    name: str
    arguments: tuple[str, ...]
    out: str


def steps_of(
    architecture: str, bits: str, rows: int, trajectories: int, backends: Sequence[str], gpu: str, low_memory: bool
) -> list[CommandStep]:
    """The commands in order; directories are relative to the work directory.

    Raises:
        InputError: `bits` is no scheme.
    """
    from edm_deploy.errors import InputError

    match = re.fullmatch(r"W(\d+)A(\d+)", bits)
    if match is None:
        raise InputError(f"--bits {bits!r}: expected a scheme such as W4A8.")
    weight_bits, act_bits = match.groups()
    calibrate: tuple[str, ...] = (
        "calibrate",
        "model",
        "--out",
        "artifact",
        "--weight-bits",
        weight_bits,
        "--act-bits",
        act_bits,
        "--rows",
        str(rows),
    )
    calibrate += ("--set", f"calibration_samples={trajectories}", *(("--low-memory",) if low_memory else ()))
    steps = [CommandStep(name="calibrate", arguments=calibrate, out="artifact")]
    exported: set[str] = set()
    for backend in backends:
        dtype = DTYPES.get(backend, "fp32")
        source = f"onnx-{dtype}"
        if backend in FROM_ARTIFACT:
            source = "artifact"
        elif dtype not in exported:
            steps.append(
                CommandStep(name=f"export {dtype}", arguments=("export", "artifact", "--out", source, "--dtype", dtype), out=source)
            )
            exported.add(dtype)
        arguments: tuple[str, ...] = ("build-engine", source, "--out", f"engine-{backend}", "--backend", backend, "--batch", "1:2:2")
        arguments += ("--gpu", gpu) if backend in FOR_A_GPU else ()
        steps.append(CommandStep(name=f"{BUILD}{backend}", arguments=arguments, out=f"engine-{backend}"))
    return steps


def run_steps(steps: Sequence[CommandStep], work: Path) -> dict[str, dict[str, Any]]:
    """Run the steps that have not been run in `work` by the same command; returns the record of every step by name.

    Raises:
        EdmDeployError: A step failed; the message holds its last line.
    """
    from edm_deploy.errors import EdmDeployError
    from edm_deploy_tools.common.child_process import run_measured

    path = work / RESULTS
    records: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else {}
    stale = False
    for step in steps:
        known = records.get(step.name)
        if not stale and known and known["arguments"] == list(step.arguments) and (work / step.out).is_dir():
            continue
        stale = True  # later steps used an older result
        measured = run_measured([sys.executable, "-m", "edm_deploy_tools.cli", *step.arguments], cwd=work)
        if measured.returncode:
            raise EdmDeployError(f"{step.name} failed after {measured.seconds:.0f} s: {measured.last_line}")
        records[step.name] = {
            "arguments": list(step.arguments),
            "seconds": round(measured.seconds, 1),
            "peak_bytes": measured.peak_bytes,
            "out_bytes": console.bytes_of(work / step.out),
        }
        if step.name.startswith(BUILD):
            records[step.name]["sites"] = sites_of(work / step.out)
        path.write_text(json.dumps(records, indent=2) + "\n")
    return {step.name: records[step.name] for step in steps}


def sites_of(engine: Path) -> dict[str, int]:
    """Number of sites that an engine computes in `int8`, `int4` or `float`, from its manifest."""
    from collections import Counter

    from edm_deploy.runtime.manifest import Manifest

    manifest = Manifest.read(engine, kind="engine")
    return dict(sorted(Counter(plan.executed for plan in manifest.plan.values()).items()))


def verdicts(architecture: str, bits: str, records: Mapping[str, Mapping[str, Any]], float_bytes: int) -> list[console.Row]:
    """Each limit with the measured value, and whether it is kept."""
    rows: list[console.Row] = []

    def check(what: str, measured: float, limit: float, unit: str) -> None:
        rows.append(
            {
                "limit": what,
                "measured": f"{measured:.2f}{unit}",
                "at most": f"{limit:g}{unit}",
                "kept": "yes" if measured <= limit else "NO",
            }
        )

    chain = [records[name] for name in ("calibrate", "export fp16", "build trt-rtx") if name in records]
    if architecture in LIMITS and len(chain) == 3:
        limit = LIMITS[architecture]
        check("calibrate + export fp16 + build trt-rtx", sum(record["seconds"] for record in chain) / 60, limit.seconds / 60, " min")
        check("peak memory of the three", max(record["peak_bytes"] for record in chain) / 1e9, limit.peak_bytes / 1e9, " GB")
    for name, record in records.items():
        if name.startswith("export"):
            check(f"{name}: peak memory / float16 weights", record["peak_bytes"] / float_bytes, EXPORT_LIMIT, "x")
    if bits.startswith("W4"):
        check("artifact / float16 weights", records["calibrate"]["out_bytes"] / float_bytes, ARTIFACT_LIMIT, "x")
    return rows


@app.command()
def main(
    architecture: Annotated[str, typer.Option(help="Published architecture, for example sd15 or sdxl.")] = "sd15",
    bits: Annotated[str, typer.Option(help="Bits of weights and activations, such as W4A8.")] = "W4A8",
    rows: Annotated[int, typer.Option(help="Number of calibrated timesteps, one table row each.")] = 20,
    trajectories: Annotated[int, typer.Option(help="Number of calibration trajectories.")] = 2,
    size: Annotated[int | None, typer.Option(help="Height and width of a sample in latents. Default: the model's.")] = None,
    layers: Annotated[int | None, typer.Option(help="Blocks of each kind of a transformer. Default: all.")] = None,
    backends: Annotated[str, typer.Option(help="Backends, separated by commas: ort, openvino, trt-rtx, trt, cuda, cpu.")] = "trt-rtx",
    gpu: Annotated[str, typer.Option(help="GPU that trt-rtx and cuda build for.")] = "sm_86",
    low_memory: Annotated[bool, typer.Option("--low-memory", help="Calibrate with --low-memory.")] = False,
    work: Annotated[Path, typer.Option(metavar="DIR", help="Directory for all results; completed steps in it are kept.")] = Path(
        "bench-scale"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")] = False,
) -> None:
    """Quantize, export and build a published architecture with random weights; print time and peak memory of each step."""
    from edm_deploy_tools.common.machine import measurement_conditions
    from edm_deploy_tools.inspection.architectures import architecture as architecture_named
    from edm_deploy_tools.inspection.architectures import with_layers
    from edm_deploy_tools.inspection.random_model import weight_bytes, write_random_model

    chosen = architecture_named(architecture)
    chosen = chosen if layers is None else with_layers(chosen, layers)
    steps = steps_of(architecture, bits, rows, trajectories, [name for name in backends.split(",") if name], gpu, low_memory)
    place = work / (f"{architecture}-{size or 'own'}" + (f"-{layers}-layers" if layers else ""))
    model = place / "model"
    if not model.is_dir():
        write_random_model(chosen, model, size=size)
    records = run_steps(steps, place)
    float_bytes = weight_bytes(model)
    # The limits apply to complete models: of a few blocks the embedders are the largest part, and the interpreter is larger than the weights.
    limits = [] if layers else verdicts(architecture, bits, records, float_bytes)
    conditions = {
        "model": f"{chosen.title}, {chosen.parameters:,} parameters, random weights, {float_bytes / 1e9:.2f} GB as float16",
        "scheme": f"{bits}, {rows} rows, {trajectories} trajectories, latents {size or 'of the native size'}",
        **measurement_conditions(),
    }
    if as_json:
        console.print_json({"conditions": conditions, "steps": records, "limits": limits, "asked": [asdict(step) for step in steps]})
        return
    console.print_facts(conditions)
    console.print_table("Each step in a new process", _rows(records, float_bytes))
    if limits:
        console.print_table("Limits", limits)


def _rows(records: Mapping[str, Mapping[str, Any]], float_bytes: int) -> list[console.Row]:
    return [
        {
            "step": name,
            "seconds": record["seconds"],
            "peak GB": round(record["peak_bytes"] / 1e9, 2),
            "peak / float16": round(record["peak_bytes"] / float_bytes, 2),
            "written GB": round(record["out_bytes"] / 1e9, 3),
            "sites": ", ".join(f"{count} {how}" for how, count in record.get("sites", {}).items()),
        }
        for name, record in records.items()
    ]


if __name__ == "__main__":
    run_app.set_passive_openmp()
    sys.exit(run_app.run(app, "bench_scale"))
