"""What one fine-tuning step costs beside the same work on the float model, in time and in memory."""

from __future__ import annotations

import copy
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from calibration.data.noise_schedules import calibrated_timesteps
from calibration.data.trajectory_pool import Trajectories
from calibration.recipe import TrainingContext
from calibration.recipes.efficientdm import EfficientDM
from calibration.run.dtypes import DTYPES
from calibration.run.memory import peak_memory
from calibration.run.options import Run, RunOptions
from calibration.student.teacher import Teacher
from calibration.training.distillation import Training
from edm_deploy.errors import EdmDeployError
from edm_deploy.pipelines.source import Source, load_source

VARIANTS = ("float", "step")


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Medians of `repeats` interleaved measurements at one batch size.

    Attributes:
        float_seconds: Teacher forward, then forward and backward of the float model, float32 as diffusers loads it.
        step_seconds: One whole fine-tuning step: teacher, student, backward, optimizer, pool.
        float_peak_bytes: Peak memory of a fresh process that did the former twice; None where not measured.
        step_peak_bytes: The same of the latter.
        batch: Samples.
        repeats: Measurements of each.
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


def step_cost(
    source: Source, recipe: EfficientDM, *, batch: int = 32, repeats: int = 7, memory: bool = True, device: str = "cpu"
) -> StepCost:
    """Measure one fine-tuning step against the float model's.

    Args:
        source: The model; for `memory` its name must be a path or hub id that a fresh process can load.
        recipe: Its settings are used, but for batch and rows.
        batch: Samples.
        repeats: Measurements of each, after one of each that is not counted.
        memory: Whether to start a fresh process for the peak memory of each.
        device: Where.

    Raises:
        EdmDeployError: A process for the peak memory failed; the message holds its last line.
    """
    works = {"float": float_work(source, batch, device), "step": step_work(source, recipe, batch, device)}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(repeats + 1):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    peaks = {name: _peak_in_fresh_process(source.name, name, recipe, batch, device) if memory else None for name in VARIANTS}
    return StepCost(
        float_seconds=medians["float"],
        step_seconds=medians["step"],
        float_peak_bytes=peaks["float"],
        step_peak_bytes=peaks["step"],
        batch=batch,
        repeats=repeats,
    )


def float_work(source: Source, batch: int, device: str) -> Callable[[], object]:
    """A function that does teacher forward, float forward and backward once, all float32."""
    trajectories = _pool(source, 2, batch, device)
    teacher = copy.deepcopy(source.model).to(device)
    student = copy.deepcopy(source.model).to(device).requires_grad_(True)
    family = source.family_object

    def work() -> None:
        inputs = trajectories.next_batch(batch).inputs
        with torch.no_grad():
            target = family.forward(teacher, inputs)
        loss = (family.forward(student, inputs) - target).square().sum()
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for parameter in student.parameters():
            parameter.grad = None
        loss.item()  # waits for an accelerator

    return work


def step_work(source: Source, recipe: EfficientDM, batch: int, device: str) -> Callable[[], object]:
    """A function that takes one real fine-tuning step."""
    recipe = dataclasses.replace(recipe, batch=batch, rows=2, calibration_samples=batch, steps=1000)
    trajectories = _pool(source, recipe.rows, batch, device)
    options = RunOptions(device=device)
    teacher = Teacher(source, torch.device(device))
    student = recipe.student(source, calibrated_timesteps(source.scheduler, recipe.rows), torch.device(device))
    context = TrainingContext(student, teacher, trajectories, Run(options=options, identity={}, on_progress=lambda _: None))
    recipe.prepare(context)
    teacher.set_dtype(DTYPES[options.teacher_dtype])
    training = Training(context, recipe.groups(student), recipe.schedule)
    return lambda: training.step(0)


def _pool(source: Source, rows: int, batch: int, device: str) -> Trajectories:
    return Trajectories(source, calibrated_timesteps(source.scheduler, rows), size=batch, eta=0.0, seed=0, device=torch.device(device))


def _peak_in_fresh_process(model: str, variant: str, recipe: EfficientDM, batch: int, device: str) -> int:
    task = json.dumps(
        {
            "model": model,
            "variant": variant,
            "settings": recipe.settings(),
            "batch": batch,
            "device": device,
            "threads": torch.get_num_threads(),
        }
    )
    result = subprocess.run(
        [sys.executable, "-m", "edm_deploy_tools.benchmarks.step_cost", task], capture_output=True, text=True, check=False
    )
    if result.returncode:
        raise EdmDeployError(f"The process that measures the memory of {variant!r} failed: {result.stderr.strip().splitlines()[-1]}")
    return int(result.stdout.splitlines()[-1])


def _main(task: str) -> None:
    asked = json.loads(task)
    torch.set_num_threads(asked["threads"])
    source, batch, device = load_source(asked["model"]), asked["batch"], asked["device"]
    work = (
        float_work(source, batch, device)
        if asked["variant"] == "float"
        else step_work(source, EfficientDM(**asked["settings"]), batch, device)
    )
    work()
    work()
    sys.stdout.write(f"{peak_memory(torch.device(device))}\n")


if __name__ == "__main__":
    _main(sys.argv[1])
