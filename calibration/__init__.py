"""Quantization of a float model to an artifact: calibration and data-free training. `fit` is the entry point."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from calibration.base_pass import Pass, PassContext, SitePricer, check_passes, measuring_run
from calibration.data.preview import Preview
from calibration.data.prompts import prompts_of
from calibration.data.trajectory_pool import Trajectories
from calibration.observers.rotation import rotate_inputs
from calibration.recipe import Recipe, TrainingContext
from calibration.run.checkpoint import check_not_overwritten, saved_identity
from calibration.run.memory import peak_memory
from calibration.run.options import Interrupted, Progress, Run, RunOptions
from calibration.run.processes import check_divides
from calibration.run.time_budget import Budget
from calibration.start import CHAIN, chain_with, check_start
from calibration.student.from_artifact import structure_of, student_from_artifact, with_params
from calibration.student.quantization_spec import LayerSpec
from calibration.student.teacher import Teacher, check_finite_weights, restructured
from calibration.student.to_artifact import artifact_from_student
from calibration.training.fast_kernels import kernels_of
from edm_deploy import Artifact
from edm_deploy.artifact.fold_pre_scales import fold_pre_scales
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts, conditioner_of
from edm_deploy.pipelines.source import Source

__all__ = ["Interrupted", "Pass", "Progress", "Recipe", "RunOptions", "fit"]


def fit(
    source: Source,
    recipe: Recipe,
    options: RunOptions,
    *,
    passes: Sequence[Pass] = (),
    start: Artifact | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    prices: SitePricer | None = None,
) -> Artifact:
    """Quantize a float model with a recipe.

    Args:
        source: The float model; it is not changed.
        recipe: The method and its settings.
        options: Device, teacher dtype, checkpoints, prompts, budget.
        passes: Passes to compose the recipe with, in this order.
        start: Artifact of the same float model that training starts from, instead of from a calibration: its codes, tables, biases, structure, bits by
            site and row timesteps. `calibration.start.recipe_taking` gives a recipe its settings. None calibrates.
        on_progress: Called after every step.
        prices: Expected times of sites on a GPU, for passes with a budget of time.

    Returns:
        A valid artifact.

    Raises:
        Interrupted: SIGINT or SIGTERM was received.
        InputError: The checkpoint directory has the checkpoint of an unfinished run and `resume` is not set; the recipe is not applicable to the model or to `start`, a pass not to the recipe, or prompts are given for a model without text inputs.
        UnsupportedError: The model's scheduler is not supported for sampling trajectories.
        ArtifactError: A weight of the model is NaN or infinite, or the checkpoint to resume is missing, damaged or from a different run.
    """
    check_not_overwritten(options)
    began = time.perf_counter()
    budget = None if options.budget_seconds is None else Budget(options.budget_seconds)
    check_passes(passes, recipe)
    check_parts(recipe, options)
    device = torch.device(options.device)
    if options.prompts is not None:
        check_takes_prompts(source)
    check_finite_weights(source)
    teacher_hash = source.digest()
    if start is not None:
        check_start(start, recipe, passes, options, teacher_hash)
    structure = recipe.structure(source) if start is None else structure_of(start)
    source = restructured(source, structure)
    conditioner = conditioner_of(source, scale=recipe.guidance, prompts=prompts_of(options.prompts))
    folded, rotations = start.folded if start is not None else folded_layers(source, options.fold_time), ""
    if start is None:
        source, structure, rotations = rotate_inputs(source, recipe, structure, conditioner, device, folded)
    show = on_progress or (lambda _: None)
    pass_context = PassContext(
        source=source,
        recipe=recipe,
        conditioner=conditioner,
        device=device,
        structure=structure,
        folded=folded,
        run=replace(measuring_run(), identity={"teacher": teacher_hash}, on_progress=show),
        prices=prices,
    )
    allocation = allocated_specs(pass_context, passes, options) if start is None else {}
    configuration = _configuration(recipe, options, passes, conditioner.origin, folded)
    if allocation:
        configuration["allocation"] = {name: asdict(spec) for name, spec in allocation.items()}
    if start is not None:
        configuration |= {CHAIN: chain_with(start)}
    timesteps = row_timesteps(pass_context, passes)  # of the trajectories, and of the table rows unless an artifact has others
    trajectories = Trajectories(
        source, timesteps, size=recipe.pool_size(), eta=recipe.eta, seed=recipe.seed, device=device, conditioner=conditioner
    )
    teacher = Teacher(source, device)
    if start is None:
        student = recipe.student(source, timesteps, device, teacher=teacher, folded=folded, structure=structure, specs=allocation)
    else:
        source = with_params(source, start)
        student = student_from_artifact(start, source, device)
    for each in passes:
        each.before(student, pass_context)

    def after_calibration() -> None:
        for each in passes:
            each.calibrated(student, pass_context)

    run = Run(
        options=options,
        identity=configuration | {"teacher": teacher_hash} | ({"rotated": dict(structure.rotated)} if rotations else {}),
        on_progress=show,
        student_leads=any(each.student_leads for each in passes),
        after_calibration=after_calibration,
        preview=None if options.report is None else Preview(source, conditioner, device=device, seed=recipe.seed).sample,
        from_artifact=start is not None,
        budget=budget,
    )
    recipe.fit(TrainingContext(student, teacher, trajectories, run))
    artifact = artifact_from_student(student, source, {})
    for each in passes:
        artifact = each.finish(artifact, student, pass_context)
    scaled = len(artifact.structure.pre_scaled)
    artifact = fold_pre_scales(artifact)
    artifact.validate()
    options.processes.check_same(lambda: artifact.digest)
    provenance = {
        **configuration,
        **run.notes,
        **({"processes": options.processes.size} if options.processes.size > 1 else {}),
        **({"gradient_accumulation_steps": options.accumulation} if options.accumulation > 1 else {}),
        **({"rotations": rotations} if rotations else {}),
        **({"folded_pre_scales": f"{scaled - len(artifact.structure.pre_scaled)} of {scaled}"} if scaled else {}),
        "guidance": conditioner.scale,
        "seed": recipe.seed,
        "source": source.name,
        "teacher_sha256": teacher_hash,
        "device": options.device,
        "versions": {name: version(name) for name in ("edm-deploy", "torch", "diffusers")},
        "wall_seconds": round(time.perf_counter() - began, 1),
        "peak_memory_bytes": peak_memory(device),
    }
    return replace(artifact, provenance=provenance | dict(artifact.provenance))


def _configuration(
    recipe: Recipe, options: RunOptions, passes: Sequence[Pass], conditioning: str, folded: Sequence[str]
) -> dict[str, Any]:  # json
    """Everything besides the teacher that the result depends on, for the provenance and the identity of checkpoints."""
    return {
        "recipe": recipe.name,
        "settings": recipe.settings(),
        "teacher_dtype": options.teacher_dtype if recipe.trains else "fp32",  # calibration always computes in float32
        "conditioning": conditioning,
        **({"folded": list(folded)} if folded else {}),
        **({"budget_seconds": options.budget_seconds} if options.budget_seconds is not None else {}),
        **({"kernels": kernels_of(options)} if recipe.trains else {}),
        **({"passes": {each.name: each.settings() for each in passes}} if passes else {}),
    }


def check_parts(recipe: Recipe, options: RunOptions) -> None:
    """Refuse processes and accumulation steps that do not divide the batch, and options of training where they do not apply.

    Raises:
        InputError: The message names the option.
    """
    given = {
        "--gradient-accumulation-steps": options.accumulation > 1,
        "--gradient-checkpointing": options.checkpointing,
        "--shard-weights": options.sharding,
    }
    for name, chosen in given.items():
        if chosen and not recipe.distills:
            reason = "reconstructs one block at a time" if recipe.trains else "does not train"
            raise InputError(f"{name}: recipe {recipe.name!r} {reason}, so that it does not apply. Leave it out.")
    if options.sharding and options.processes.size == 1:
        raise InputError("--shard-weights divides frozen weights among processes, and this run has one. Add --processes, or leave it out.")
    if recipe.trains:
        kernels_of(options)  # refuses those that cannot be compiled here
        check_divides(options.processes, recipe.settings()["batch"], options.accumulation)


def row_timesteps(context: PassContext, passes: Sequence[Pass]) -> Tensor:
    """int32 [R] ascending, one per table row: those that a pass chooses, else those of sampling in as many steps.

    Raises:
        InputError: More rows than the schedule has timesteps.
    """
    for each in passes:
        if (timesteps := each.timesteps(context)) is not None:
            return timesteps
    rows = context.recipe.rows
    return calibrated_timesteps(context.source.scheduler, rows, context.source.family_object.sigmas(rows))


def allocated_specs(context: PassContext, passes: Sequence[Pass], options: RunOptions) -> dict[str, LayerSpec]:
    """Bit widths of the sites that passes give others than the recipe; of a resumed run, those that its checkpoint has."""
    if options.resume and options.checkpoint is not None:
        try:
            return {name: LayerSpec(**spec) for name, spec in saved_identity(options.checkpoint).get("allocation", {}).items()}
        except (AttributeError, TypeError):
            return {}  # a damaged description, which is refused where the checkpoint is read
    family, layers = context.source.family_object, context.source.family_object.sites(context.source.model)
    planned = {name: context.recipe.layer_spec(name, family.placement(name)) for name in layers if name not in context.folded}
    specs: Mapping[str, LayerSpec] = planned
    for each in passes:
        specs = each.specs(context, specs)
    return {name: spec for name, spec in specs.items() if spec != planned[name]}


def folded_layers(source: Source, requested: bool) -> tuple[str, ...]:
    """The sites that stay in floating point because they depend on the timestep alone; none unless requested.

    Raises:
        InputError: The family has none.
    """
    if not requested:
        return ()
    family = source.family_object
    layers = family.time_layers(source.model, source.config)
    if not layers:
        others = family.other_embedding_inputs(source.config)
        why = f": {others} enters the embedding that every block uses" if others else ""
        raise InputError(f"--fold-time: no layer of this {family.class_name} depends on the timestep alone{why}. Leave it out.")
    return layers
