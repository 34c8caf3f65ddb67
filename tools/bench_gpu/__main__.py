"""Everything that a first day on an NVIDIA GPU should tell, in at most ten minutes and without a network.

    python -m edm_deploy_tools.bench_gpu --out results

Each stage is a process of its own, so that none takes the next one with it, and after each `results.json` and a readable `results.md` are rewritten: versions and
clocks; the results of every kernel and tile; compute-sanitizer where it is installed; operators and layers of SD 1.5, SDXL and FLUX beside torch's; a whole model with
random weights; a fine-tuning step. All but the last two stages run without diffusers. With `--device cpu --small` the same code runs on the operators' CPU twins.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy_tools.bench_gpu import correctness, kernels, report
from edm_deploy_tools.bench_gpu.stage import StageResult, StageRun
from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.child_process import tied
from engines.performance.gpus import TABLE, Gpu, gpu_named

ARCHITECTURE, BATCH = "sd15", 2  # of the stage `model`
# Seconds after which a stage is ended; 600 together.
LIMITS: Mapping[str, int] = {"versions": 20, "kernels": 90, "sanitizer": 100, "operators": 50, "layers": 110, "model": 180, "training": 50}


def run_stage(name: str, run: StageRun) -> StageResult:
    """Run one stage in this process."""
    if name == "model":
        return _model(run)
    if name == "training":
        from edm_deploy_tools.bench_gpu.model import training  # imports diffusers

        return training(run)
    if name == "kernels":
        return correctness.kernels(run)
    stages: dict[str, Callable[[StageRun], StageResult]] = {
        each: getattr(kernels, each) for each in ("versions", "sanitizer", "operators", "layers")
    }
    return stages[name](run)


def _model(run: StageRun) -> StageResult:
    """One step of SD 1.5 at 512x512 with guidance, random weights."""
    from edm_deploy.models import family_named, name_of_family
    from edm_deploy_tools.bench_gpu.model import whole_model
    from edm_deploy_tools.benchmarks.traced_step import TracedModel
    from edm_deploy_tools.inspection.architectures import architecture

    chosen = architecture(ARCHITECTURE)
    return whole_model(run, TracedModel.of(family_named(name_of_family(chosen.class_name)), chosen.config), BATCH)


def bench(out: Path, stages: list[str], arguments: list[str]) -> dict[str, dict[str, Any]]:
    """Run stages one after the other, each in a new process, and write the results into `out` after each. Returns them by stage.

    Args:
        out: Directory of the results; created.
        stages: Names of LIMITS.
        arguments: Options of each process, such as `--device cpu`.
    """
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, Any]] = {}
    for stage in stages:
        console.say(f"{stage} ...")
        start = time.perf_counter()
        found = _in_new_process(stage, arguments)
        results[stage] = found | {"seconds": round(time.perf_counter() - start, 1)}
        report.write(out, results)
        console.say(f"{stage}: {found.get('error') or '; '.join(found['problems']) or 'done'} ({results[stage]['seconds']} s)")
    return results


def _in_new_process(stage: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "edm_deploy_tools.bench_gpu", "--stage", stage, *arguments]
    try:
        ran = subprocess.run(tied(command), capture_output=True, text=True, check=False, timeout=LIMITS[stage])
    except subprocess.TimeoutExpired:
        return {"error": f"not finished after {LIMITS[stage]} s", "problems": []}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode == 0 and lines:
        found: dict[str, Any] = json.loads(lines[-1])
        return found
    last = (ran.stderr.strip().splitlines() or [""])[-1]
    return {"error": f"exit code {ran.returncode}. {last}", "problems": []}


def _figures(device: torch.device, named: str | None) -> Gpu | None:
    """Figures of the GPU, for expected times; None where there are none for it."""
    if named is None and device.type != "cuda":
        return None
    try:
        return gpu_named(named or torch.cuda.get_device_name(device))
    except UnsupportedError as err:
        if named:
            raise
        sys.stderr.write(f"Note: {err}\n")
        return None


def _device(name: str) -> torch.device:
    if name not in ("cuda", "cpu"):
        raise InputError(f"--device {name}: expected cuda or cpu.")
    if name == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(
            "torch finds no CUDA device here. --device cpu --small runs the same stages on the operators' CPU twins, without meaningful times."
        )
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)


def update_profile(out: Path, profile: Path) -> None:
    """Put the measured layers of `out` into a profile in place of those that an earlier run put there."""
    marker = "# Measured by bench_gpu on "
    kept = profile.read_text().split(marker)[0].rstrip() + "\n\n"
    profile.write_text(kept + (out / report.MEASURED).read_text())


app = run_app.app_with()


@app.command()
def command(
    out: Annotated[Path, typer.Option(help="Directory of results.json, results.md and measured.toml.")] = Path("bench-gpu"),
    stages: Annotated[str, typer.Option(help="Stages to run, separated by commas.")] = ",".join(LIMITS),
    device: Annotated[str, typer.Option(help="cuda, or cpu for a dry run.")] = "cuda",
    gpu: Annotated[str | None, typer.Option(help="Figures that times are compared with. Default: those of the GPU here.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Sizes of a dry run.")] = False,
    update_profiles: Annotated[
        bool, typer.Option("--update-profiles", help="Also put the measured layers into engines/profiles/measured.toml.")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="Run one stage in this process, and print its result as JSON.", hidden=True)] = None,
) -> None:
    """Check and time everything on this machine's GPU. Example: python -m edm_deploy_tools.bench_gpu --out results."""
    chosen = [name.strip() for name in (stage or stages).split(",")]
    if unknown := [name for name in chosen if name not in LIMITS]:
        raise InputError(f"--stages {unknown[0]}: there is no such stage. Known: {', '.join(LIMITS)}.")
    on = _device(device)
    if stage:
        found = run_stage(stage, StageRun(device=on, gpu=_figures(on, gpu), small=small))
        sys.stdout.write(json.dumps(asdict(found)) + "\n")
        return
    _figures(on, gpu)  # a name that is not known ends here, not in each stage
    results = bench(out, chosen, ["--device", device, *(["--gpu", gpu] if gpu else []), *(["--small"] if small else [])])
    console.say(f"Written: {out / report.PAGE}")
    for sentence in report.summary(results):
        console.say(sentence)
    if update_profiles and (out / report.MEASURED).is_file():
        update_profile(out, TABLE.parent / "measured.toml")


if __name__ == "__main__":
    sys.exit(run_app.run(app, "python -m edm_deploy_tools.bench_gpu"))
