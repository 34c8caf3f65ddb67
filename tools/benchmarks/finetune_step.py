"""Time and memory of one fine-tuning step, compared with the least that any distillation needs: teacher forward, float forward, float backward."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from calibration.data.trajectory_pool import Trajectories
from calibration.recipe import TrainingContext
from calibration.recipes.efficientdm import EfficientDM
from calibration.run.memory import peak_memory
from calibration.run.options import Kernels, Run, RunOptions
from calibration.student.teacher import Teacher
from calibration.training.distillation import Training
from calibration.training.fast_kernels import kernels_of
from edm_deploy.errors import EdmDeployError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from edm_deploy.pipelines.source import Source, load_source
from edm_deploy_tools.benchmarks.engines import check_counts, conditions
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.recipe_settings import recipe_with

VARIANTS = ("float", "step")
ROWS = 2  # table rows of the measured step: each sample uses one, so their number does not change the time


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Medians of `repeats` interleaved measurements at one batch size.

    Attributes:
        float_seconds: Teacher forward, then forward and backward of the float model, in float32 as diffusers loads it.
        step_seconds: One complete fine-tuning step: teacher, student, backward, optimizer, trajectory pool.
        float_peak_bytes: Peak memory of a new process that runs the float step twice; None if not measured.
        step_peak_bytes: Peak memory of a new process that runs the fine-tuning step twice; None if not measured.
        batch: Samples per step.
        repeats: Measurements of each step.
    """

    float_seconds: float
    step_seconds: float
    float_peak_bytes: int | None
    step_peak_bytes: int | None
    batch: int
    repeats: int

    @property
    def ratio(self) -> float:
        """`step_seconds / float_seconds`."""
        return self.step_seconds / self.float_seconds


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """A completed measurement.

    Attributes:
        conditions: Machine, versions, batch, number of measurements, date.
        cost: Medians and peaks.
    """

    conditions: Mapping[str, Any]
    cost: StepCost

    def rows(self) -> list[Row]:
        """One row for the float step and one for the fine-tuning step."""
        cost = self.cost
        measured = (
            ("float step: teacher, forward, backward, fp32", cost.float_seconds, cost.float_peak_bytes),
            ("fine-tuning step: efficientdm", cost.step_seconds, cost.step_peak_bytes),
        )
        return [
            {
                "name": name,
                "median ms": round(1000 * seconds, 1),
                "of the float step": round(seconds / cost.float_seconds, 2),
                "peak GB": round(peak / 1e9, 2) if peak else None,
                "n": cost.repeats,
            }
            for name, seconds, peak in measured
        ]

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {"conditions": dict(self.conditions), "results": self.rows(), "ratio": self.cost.ratio}


def bench_finetune_step(model: str, *, batch: int, rounds: int, threads: int | None = None, kernels: Kernels = "auto") -> TrainingCost:
    """Time a step of the `efficientdm` recipe and a step of float distillation alternately, then measure the peak memory of each in a new process.

    Args:
        model: A local diffusers directory or a hub id.
        batch: Samples per step.
        rounds: Measurements of each step.
        threads: CPU threads; None is torch's default.
        kernels: Those of the fine-tuning step, as `finetune --kernels`. What the first step compiles is not measured.

    Raises:
        InputError: A number below 1.
        ArtifactError, UnsupportedError: As load_source.
        EdmDeployError: As `step_cost`.
    """
    check_counts(batch, rounds, threads)
    if threads:
        torch.set_num_threads(threads)
    cost = step_cost(load_source(model), recipe_with("efficientdm"), batch=batch, repeats=rounds, kernels=kernels)
    return TrainingCost(conditions=conditions(batch, rounds, threads) | {"kernels": kernels_of(RunOptions(kernels=kernels))}, cost=cost)


def step_cost(
    source: Source,
    recipe: EfficientDM,
    *,
    batch: int = 32,
    repeats: int = 7,
    memory: bool = True,
    device: str = "cpu",
    kernels: Kernels = "auto",
) -> StepCost:
    """Measure one fine-tuning step against one step of the float model.

    Args:
        source: The model; for `memory` its name must be a path or hub id that a new process can load.
        recipe: Its settings, except batch and rows.
        batch: Samples per step.
        repeats: Measurements of each step, after one warm-up.
        memory: Whether to measure the peak memory of each step in a new process.
        device: Device of the models.
        kernels: Those of the fine-tuning step, as `finetune --kernels`.

    Raises:
        EdmDeployError: A process that measures peak memory failed; the message holds its last line.
    """
    steps = {"float": float_step(source, batch, device), "step": finetune_step(source, recipe, batch, device, kernels)}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    peaks = {name: _peak_in_new_process(source.name, name, recipe, batch, device, kernels) if memory else None for name in VARIANTS}
    return StepCost(
        float_seconds=medians["float"],
        step_seconds=medians["step"],
        float_peak_bytes=peaks["float"],
        step_peak_bytes=peaks["step"],
        batch=batch,
        repeats=repeats,
    )


def float_step(source: Source, batch: int, device: str) -> Callable[[], object]:
    """A function that runs teacher forward, float forward and float backward once, all in float32."""
    trajectories = _pool(source, ROWS, batch, device)
    teacher = copy.deepcopy(source.model).to(device)
    student = copy.deepcopy(source.model).to(device).requires_grad_(True)
    family = source.family_object

    def step() -> None:
        inputs = trajectories.next_batch(batch).inputs
        with torch.no_grad():
            target = family.forward(teacher, inputs)
        loss = (family.forward(student, inputs) - target).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # untyped in torch
        for parameter in student.parameters():
            parameter.grad = None
        loss.item()  # waits for an accelerator

    return step


def finetune_step(source: Source, recipe: EfficientDM, batch: int, device: str, kernels: Kernels = "auto") -> Callable[[], object]:
    """A function that runs one complete fine-tuning step."""
    recipe = dataclasses.replace(recipe, batch=batch, rows=ROWS, calibration_samples=batch, steps=1000)
    trajectories = _pool(source, recipe.rows, batch, device)
    options = RunOptions(device=device, kernels=kernels)
    teacher = Teacher(source, torch.device(device))
    student = recipe.student(source, calibrated_timesteps(source.scheduler, recipe.rows), torch.device(device))
    context = TrainingContext(student, teacher, trajectories, Run(options=options, identity={}, on_progress=lambda _: None))
    recipe.prepare(context)
    teacher.set_dtype(options.teacher_dtype)
    training = Training(context, recipe.groups(student), recipe.schedule)
    return lambda: training.step(0)


def _pool(source: Source, rows: int, batch: int, device: str) -> Trajectories:
    return Trajectories(source, calibrated_timesteps(source.scheduler, rows), size=batch, eta=0.0, seed=0, device=torch.device(device))


def _peak_in_new_process(model: str, variant: str, recipe: EfficientDM, batch: int, device: str, kernels: Kernels) -> int:
    threads = torch.get_num_threads()
    task = {"model": model, "variant": variant, "settings": recipe.settings(), "batch": batch, "device": device, "threads": threads}
    task |= {"kernels": kernels}
    command = [sys.executable, "-m", "edm_deploy_tools.benchmarks.finetune_step", json.dumps(task)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise EdmDeployError(f"The process that measures the memory of {variant!r} failed: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout.splitlines()[-1])


def _main(task: str) -> None:
    """Run one step twice and print the peak memory of this process in bytes."""
    config = json.loads(task)
    torch.set_num_threads(config["threads"])
    source, batch, device = load_source(config["model"]), config["batch"], config["device"]
    recipe = EfficientDM(**config["settings"])
    if config["variant"] == "float":
        step = float_step(source, batch, device)
    else:
        step = finetune_step(source, recipe, batch, device, config["kernels"])
    step()
    step()
    sys.stdout.write(f"{peak_memory(torch.device(device))}\n")


if __name__ == "__main__":
    _main(sys.argv[1])
