"""The commands that quantize: `calibrate` and `finetune`, which differ in their recipe and in their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from edm_deploy_tools.commands import options as opt
from edm_deploy_tools.common import console


def calibrate(
    model: opt.Model,
    out: opt.Out,
    recipe: Annotated[str, typer.Option(help="minmax, percentile, mse or static.")] = "mse",
    weight_bits: opt.WeightBits = None,
    act_bits: opt.ActBits = None,
    rows: opt.Rows = None,
    seed: opt.Seed = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    settings: opt.Set = None,
    passes: opt.With = None,
    backend: opt.For = None,
    device: opt.DeviceOption = opt.Device.CPU,
    teacher_dtype: opt.Teacher = None,
    prompts: opt.Prompts = None,
    fold_time: opt.FoldTime = False,
    low_memory: opt.LowMemory = False,
    force: opt.Force = False,
) -> None:
    """Quantize MODEL without training: observe its layers along its own trajectories. W8A8 unless told otherwise."""
    flags = {"weight_bits": weight_bits, "act_bits": act_bits, "rows": rows, "seed": seed}
    run = {"device": device.value, "teacher_dtype": opt.value(teacher_dtype), "fold_time": fold_time, "prompts": prompts}
    _quantize(model, out, recipe, flags, config, preset, settings, passes, backend, low_memory, force, **run)


def finetune(
    model: opt.Model,
    out: opt.Out,
    recipe: Annotated[str, typer.Option(help="efficientdm, quest, qdiff, dilate, mpq-dm, tcaq or qat.")] = "efficientdm",
    weight_bits: opt.WeightBits = None,
    act_bits: opt.ActBits = None,
    rows: opt.Rows = None,
    seed: opt.Seed = None,
    config: opt.Config = None,
    preset: opt.Preset = None,
    settings: opt.Set = None,
    passes: opt.With = None,
    backend: opt.For = None,
    device: opt.DeviceOption = opt.Device.CPU,
    teacher_dtype: opt.Teacher = None,
    prompts: opt.Prompts = None,
    fold_time: opt.FoldTime = False,
    low_memory: opt.LowMemory = False,
    force: opt.Force = False,
    budget: opt.Budget = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint of an interrupted run.")] = False,
) -> None:
    """Quantize MODEL and fine-tune it without data against itself. W4A4 unless told otherwise. Ctrl-C leaves a checkpoint for --resume."""
    from calibration.run.time_budget import seconds_of

    flags = {"weight_bits": weight_bits, "act_bits": act_bits, "rows": rows, "seed": seed}
    checkpoint = out.with_name(out.name + ".checkpoint")
    run = {
        "prompts": prompts,
        "device": device.value,
        "teacher_dtype": opt.value(teacher_dtype),
        "fold_time": fold_time,
        "checkpoint": checkpoint,
        "budget_seconds": None if budget is None else seconds_of(budget),
        "resume": resume,
    }
    _quantize(model, out, recipe, flags, config, preset, settings, passes, backend, low_memory, force, **run)


def _quantize(
    model: str,
    out: Path,
    recipe: str,
    flags: dict[str, Any],
    config: Path | None,
    preset: str | None,
    settings: list[str] | None,
    passes: list[str] | None,
    backend: str | None,
    low_memory: bool,
    force: bool,
    **run: Any,
) -> None:
    from edm_deploy_tools.commands.quantize_model import quantize, run_options
    from edm_deploy_tools.common.recipe_settings import passes_with, recipe_with, sorted_overrides

    of_recipe, of_passes = sorted_overrides(settings or ())
    chosen = recipe_with(recipe, preset=preset, config=config, flags=flags, overrides=of_recipe)
    composed = passes_with(passes or (), of_passes)
    artifact = quantize(model, out, chosen, run_options(**run), passes=composed, backend=backend, low_memory=low_memory, force=force)
    console.wrote(out, f"artifact, {artifact.scheme}, {len(artifact.sites)} sites, {len(artifact.timesteps)} rows")
    if artifact.folded:
        console.say(f"{len(artifact.folded)} layers see the timestep alone: they stay in floating point, and export makes a table of them.")
