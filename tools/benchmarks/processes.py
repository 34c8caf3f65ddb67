"""Time fine-tuning in several processes against one process with as many threads, in turns, on the same cores.

Run as `python -m edm_deploy_tools.benchmarks.processes`. Times are those between two steps of the training, without start, calibration and first step.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.common import console, run_app
from edm_deploy_tools.common.assets import REFERENCE_MODEL
from edm_deploy_tools.common.process_launcher import threads_of_each

app = run_app.app_with()
LINE = re.compile(r"^finetune (\d+)/(\d+) loss \S+, ([\d.]+)/s")


def steps_per_second(command: list[str], threads: int) -> float:
    """Rate of a run's training at its end, from its progress.

    Raises:
        CommandFailed: The run failed; with its last line.
    """
    ran = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    rates = [match for line in ran.stderr.splitlines() if (match := LINE.match(line))]
    if ran.returncode or not rates:
        raise run_app.CommandFailed(2, (ran.stderr.strip().splitlines() or ["The run reported no step."])[-1])
    return float(rates[-1][3])


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Model to fine-tune. Default: the shipped one.")] = str(REFERENCE_MODEL),
    processes: Annotated[int, typer.Option(min=2, help="Processes of the divided run.")] = 2,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of all processes together. Default: the cores.")] = None,
    steps: Annotated[int, typer.Option(min=2, help="Training steps of each run.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Samples of a step.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each kind, in turns.")] = 3,
) -> None:
    """Print steps per second of both, medians of the runs, and their ratio."""
    whole = threads or threads_of_each(1)
    settings = [
        f"--set={name}={value}"
        for name, value in {"steps": steps, "batch": batch, "step_weighting": 0, "calibration_samples": max(batch, 8)}.items()
    ]
    found: dict[int, list[float]] = {1: [], processes: []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats):
            for count, rates in found.items():
                out = Path(folder) / f"{count}-{repeat}"
                command = [
                    sys.executable,
                    "-m",
                    "edm_deploy_tools",
                    "finetune",
                    model,
                    "--out",
                    str(out),
                    "--rows",
                    "4",
                    "--processes",
                    str(count),
                    *settings,
                ]
                rates.append(steps_per_second(command, max(1, whole // count)))
    medians = {count: statistics.median(rates) for count, rates in found.items()}
    rows = [
        {
            "processes": count,
            "threads of each": max(1, whole // count),
            "steps/s": medians[count],
            "runs": " ".join(f"{rate:.2f}" for rate in rates),
        }
        for count, rates in found.items()
    ]
    console.print_table(f"{Path(model).name}, batch {batch}, {steps} steps", rows)
    console.say(f"{processes} processes: {medians[processes] / medians[1]:.2f} times the steps per second of one process")


if __name__ == "__main__":
    raise SystemExit(run_app.run(app, "python -m edm_deploy_tools.benchmarks.processes"))
