"""The commands that quantize a model: `calibrate` and `finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt
from edm_deploy_tools.common.process_launcher import launches, run_processes

if TYPE_CHECKING:
    from edm_deploy_tools.commands.quantize_model import QuantizeRequest


def calibrate(
    model: opt.Model,
    out: opt.Out,
    recipe: Annotated[str, typer.Option(help="Calibration method: minmax, percentile, mse, svdquant or static.")] = "mse",
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
    overwrite: opt.Overwrite = False,
) -> None:
    """Quantize MODEL without training: ranges are observed on its own sampling trajectories. Default W8A8."""
    from edm_deploy_tools.commands.quantize_model import QuantizeRequest, run_options
    from edm_deploy_tools.common.recipe_settings import RecipeChoice

    opt.check_new(out, overwrite)
    chosen, composed = RecipeChoice(
        recipe=recipe,
        preset=preset,
        config=config,
        flags={"weight_bits": weight_bits, "act_bits": act_bits, "rows": rows, "seed": seed},
        overrides=settings or (),
        passes=passes or (),
    ).build()
    options = run_options(device=device.value, teacher_dtype=opt.value(teacher_dtype), fold_time=fold_time, prompts=prompts)
    _quantize(
        QuantizeRequest(
            model=model, out=out, recipe=chosen, options=options, passes=composed, backend=backend, low_memory=low_memory, force=force
        )
    )


# typer reads the options of a command from its signature, so both commands list those that they share.
def finetune(
    context: typer.Context,
    model: opt.Model,
    out: opt.Out,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="ARTIFACT", help="Artifact of MODEL that training starts from. MODEL may also be the artifact itself."
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Fine-tuning method: efficientdm, quest, qdiff, dilate, mpq-dm, tcaq or qat.")
    ] = "efficientdm",
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
    overwrite: opt.Overwrite = False,
    checkpoint_every: opt.CheckpointEvery = "10m",
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint of an interrupted run.")] = False,
    processes: opt.Processes = None,
    accumulation: opt.Accumulation = 1,
    checkpointing: opt.Checkpointing = False,
    sharding: opt.Sharding = False,
    mixed_precision: opt.MixedPrecision = None,
    report_to: opt.ReportTo = None,
    kernels: opt.TrainingKernels = opt.Kernels.AUTO,
) -> None:
    """Quantize MODEL and fine-tune it against the float model, without data. Default W4A4. Ctrl-C saves a checkpoint for --resume.

    With --from ARTIFACT, or with an artifact as MODEL, training continues from that artifact: its codes, tables, biases, structure and bits.
    """
    if launches(processes):
        assert processes is not None
        run_processes(processes, [sys.executable, "-m", "edm_deploy_tools", *context.obj])
        return

    from calibration.run.processes import joined
    from calibration.run.time_budget import seconds_of
    from calibration.start import recipe_taking
    from edm_deploy_tools.commands.quantize_model import QuantizeRequest, checkpoint_of, compute_dtypes, run_options, start_of
    from edm_deploy_tools.common.recipe_settings import RecipeChoice

    opt.check_new(out, overwrite)
    compute, teacher = compute_dtypes(opt.value(mixed_precision), opt.value(teacher_dtype), settings or ())
    choice = RecipeChoice(
        recipe=recipe,
        preset=preset,
        config=config,
        flags={"weight_bits": weight_bits, "act_bits": act_bits, "rows": rows, "seed": seed, "compute": compute},
        overrides=settings or (),
        passes=passes or (),
    )
    chosen, composed = choice.build()
    started = start_of(model, start)
    if started.artifact is not None:
        chosen = recipe_taking(chosen, started.artifact, sorted(choice.chosen()))
    options = run_options(
        device=device.value,
        processes=joined(device.value, requested=processes),
        accumulation=accumulation,
        checkpointing=checkpointing,
        sharding=sharding,
        teacher_dtype=teacher,
        fold_time=fold_time,
        prompts=prompts,
        checkpoint=checkpoint_of(out),
        budget_seconds=None if budget is None else seconds_of(budget),
        checkpoint_seconds=seconds_of(checkpoint_every, name="--checkpoint-every"),
        resume=resume,
        kernels=kernels.value,
    )
    _quantize(
        QuantizeRequest(
            model=started.model,
            out=out,
            recipe=chosen,
            options=options,
            start=started.artifact,
            passes=composed,
            backend=backend,
            low_memory=low_memory,
            force=force,
            report=None if report_to is None else out.with_name(f"{out.name}.{report_to.value}"),
        )
    )


def _quantize(request: QuantizeRequest) -> None:
    from edm_deploy_tools.commands.quantize_model import quantize

    artifact = quantize(request)
    if not request.options.processes.writes:
        return
    console.wrote(request.out, f"artifact, {artifact.scheme}, {len(artifact.sites)} sites, {len(artifact.timesteps)} rows")
    if artifact.folded:
        console.say(
            f"{len(artifact.folded)} layers depend on the timestep alone: they stay in floating point, and export replaces them by a table."
        )
