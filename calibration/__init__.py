"""From a float model to an artifact: trajectories, observers, training, recipes. `fit` is the door."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from calibration.base_pass import Pass, PassContext, check_passes
from calibration.data.noise_schedules import calibrated_timesteps
from calibration.data.prompts import prompts_of
from calibration.data.trajectory_pool import Trajectories
from calibration.recipe import Recipe
from calibration.run.memory import peak_memory
from calibration.run.options import Interrupted, Progress, Run, RunOptions
from calibration.run.time_budget import Budget
from calibration.student.teacher import Teacher, restructured
from calibration.student.to_artifact import artifact_from_student
from edm_deploy import Artifact
from edm_deploy.artifact.fold_pre_scales import fold_pre_scales
from edm_deploy.errors import InputError
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts, conditioner_of
from edm_deploy.pipelines.source import Source

__all__ = ["Interrupted", "Pass", "Progress", "Recipe", "RunOptions", "fit"]


def fit(
    source: Source,
    recipe: Recipe,
    options: RunOptions,
    *,
    passes: Sequence[Pass] = (),
    on_progress: Callable[[Progress], None] | None = None,
) -> Artifact:
    """Quantize a float model by a recipe.

    Args:
        source: The float model; it is not changed.
        recipe: The method and its settings.
        options: Device, checkpoints.
        passes: What the recipe is composed with, in this order.
        on_progress: Called after every step.

    Returns:
        A valid artifact.

    Raises:
        Interrupted: Ctrl-C was heeded.
        InputError: The recipe does not fit the model, or a pass not the recipe, or prompts are given for a model that takes none.
        UnsupportedError: The model's scheduler gives no trajectory.
        ArtifactError: A checkpoint to resume is missing, damaged or of another run.
    """
    start = time.perf_counter()
    budget = None if options.budget_seconds is None else Budget(options.budget_seconds)
    check_passes(passes, recipe)
    device = torch.device(options.device)
    if options.prompts is not None:
        check_takes_prompts(source)
    teacher_hash = source.digest()
    structure = recipe.structure(source)
    source = restructured(source, structure)
    conditioner = conditioner_of(source, scale=recipe.guidance, prompts=prompts_of(options.prompts))
    folded = folded_layers(source, options.fold_time)
    decides: dict[str, Any] = {  # json
        "recipe": recipe.name,
        "settings": recipe.settings(),
        "teacher_dtype": options.teacher_dtype,
        "conditioning": conditioner.origin,
    }
    decides |= {"folded": list(folded)} if folded else {}
    decides |= {"budget_seconds": options.budget_seconds} if budget is not None else {}
    decides |= {"passes": {chosen.name: chosen.settings() for chosen in passes}} if passes else {}
    identity = decides | {"teacher": teacher_hash}
    context = PassContext(source=source, recipe=recipe, conditioner=conditioner, device=device)
    timesteps = row_timesteps(context, passes)
    size = recipe.pool_size()
    trajectories = Trajectories(source, timesteps, size=size, eta=recipe.eta, seed=recipe.seed, device=device, conditioner=conditioner)
    teacher = Teacher(source, device)
    student = recipe.student(source, timesteps, device, teacher=teacher, folded=folded, segments=structure.segments)
    for chosen in passes:
        chosen.before(student, context)
    progress = on_progress or (lambda _: None)

    def after_calibration() -> None:
        for chosen in passes:
            chosen.calibrated(student, context)

    run = Run(
        options=options,
        identity=identity,
        on_progress=progress,
        student_leads=any(chosen.student_leads for chosen in passes),
        after_calibration=after_calibration,
        budget=budget,
    )
    recipe.fit(student, teacher, trajectories, run)
    artifact = artifact_from_student(student, source, {})
    for chosen in passes:
        artifact = chosen.finish(artifact, student, context)
    scaled = len(artifact.structure.pre_scaled)
    artifact = fold_pre_scales(artifact)
    artifact.validate()
    provenance = {
        **decides,
        **run.notes,
        **({"folded_pre_scales": f"{scaled - len(artifact.structure.pre_scaled)} of {scaled}"} if scaled else {}),
        "guidance": conditioner.scale,
        "seed": recipe.seed,
        "source": source.name,
        "teacher_sha256": teacher_hash,
        "device": options.device,
        "versions": {name: version(name) for name in ("edm-deploy", "torch", "diffusers")},
        "wall_seconds": round(time.perf_counter() - start, 1),
        "peak_memory_bytes": peak_memory(device),
    }
    return replace(artifact, provenance=provenance | dict(artifact.provenance))


def row_timesteps(context: PassContext, passes: Sequence[Pass]) -> Tensor:
    """int32 [R] ascending, one a table row: those that a pass chooses, else those of a sampling with as many steps.

    Raises:
        InputError: More rows than the schedule has timesteps.
    """
    for chosen in passes:
        if (found := chosen.timesteps(context)) is not None:
            return found
    rows = context.recipe.rows
    return calibrated_timesteps(context.source.scheduler, rows, context.source.family_object.sigmas(rows))


def folded_layers(source: Source, asked: bool) -> tuple[str, ...]:
    """The sites that stay in floating point because they see the timestep alone.

    Raises:
        InputError: It is asked for, and the family has none.
    """
    family = source.family_object
    if not asked:
        return ()
    layers = family.time_layers(source.model, source.config)
    if not layers:
        beside = family.other_embedding_inputs(source.config)
        why = f": {beside} enters the embedding that shapes every block" if beside else ""
        raise InputError(f"--fold-time: no layer of this {family.class_name} can be a table of the timestep alone{why}. Leave it out.")
    return layers
