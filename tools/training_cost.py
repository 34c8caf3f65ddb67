"""What one fine-tuning step costs, against the least that any distillation must pay: teacher forward, float forward, float backward."""

from __future__ import annotations

import copy

import torch
from torch.nn import functional

from calibration.distill import Training
from calibration.memory import peak_memory
from calibration.recipe import Progress, Run, RunOptions
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.mse import Mse
from calibration.student import DTYPES, Student, Teacher
from calibration.trajectories import Trajectories, calibrated_timesteps
from edm_deploy.errors import InputError
from edm_deploy.pipelines import Source, load_source
from edm_deploy_tools.bench import Bench, Call, conditions, in_turns

ROWS = 10  # of the tables here: their number changes nothing in a step's cost
FLOAT = "float step (teacher + forward + backward, fp32)"


def bench_finetune_step(model: str, *, batch: int, rounds: int, threads: int | None = None) -> Bench:
    """Time a step of the `efficientdm` recipe and a step of float distillation, in turns.

    Args:
        model: A local diffusers directory or a hub id.
        batch: Samples a step.
        rounds: Measurements of each.
        threads: CPU threads; None is torch's default.

    Raises:
        InputError: A number below 1.
        ArtifactError, UnsupportedError: As load_source.
    """
    for name, value in (("--batch", batch), ("--rounds", rounds), ("--threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: expected 1 or more.")
    if threads:
        torch.set_num_threads(threads)
    source = load_source(model)
    step = finetune_step(source, batch)
    for _ in range(2):
        step()
    peak = peak_memory(torch.device("cpu"))  # before the float step allocates anything
    timings = in_turns({FLOAT: float_step(source, batch), "fine-tuning step (efficientdm)": step}, rounds)
    return Bench(
        conditions=conditions(batch, rounds, threads) | {"peak_memory_gb_of_finetuning": round(peak / 1e9, 2)}, timings=timings, batch=batch
    )


def finetune_step(source: Source, batch: int) -> Call:
    """One step of `efficientdm` after the other; calibrated first, on few samples."""
    recipe = EfficientDM(batch=batch, rows=ROWS, calibration_samples=batch, steps=1_000_000)
    device = torch.device("cpu")
    timesteps = calibrated_timesteps(source.scheduler, recipe.rows)
    trajectories = Trajectories(source, timesteps, size=recipe.pool_size(), eta=recipe.calibration_eta, seed=0, device=device)
    teacher, student = Teacher(source, device), Student(source, recipe, timesteps, device)
    generator = torch.Generator().manual_seed(0)
    for layer in student.layers.values():
        layer.add_update(recipe.rank, generator)
    Mse.fit(recipe, student, teacher, trajectories, Run(options=RunOptions(), identity={}, on_progress=_ignore))
    student.compute_dtype = DTYPES[recipe.compute]
    teacher.lead_in(DTYPES[RunOptions().teacher_dtype])
    training = Training(student, teacher, trajectories, recipe.groups(student), recipe.schedule)
    number = iter(range(recipe.steps))
    return lambda: training.step(next(number))


def float_step(source: Source, batch: int) -> Call:
    """Teacher forward, float forward and backward to every weight, in float32."""
    student = copy.deepcopy(source.model).requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    family = source.family_object
    inputs = {
        "sample": torch.randn(batch, *family.sample_shape(source.config), generator=generator),
        "timestep": torch.linspace(0, source.num_train_timesteps - 1, batch).round(),
    } | family.random_conditioning(source.config, batch, generator)

    def step() -> None:
        with torch.no_grad():
            target = family.forward(source.model, inputs)
        student.zero_grad(set_to_none=True)
        functional.mse_loss(family.forward(student, inputs), target).backward()

    return step


def _ignore(_: Progress) -> None: ...
