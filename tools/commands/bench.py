"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt

if TYPE_CHECKING:
    from edm_deploy_tools.benchmarks.engines import Bench
    from edm_deploy_tools.benchmarks.finetune_step import TrainingCost


def bench(
    engines: Annotated[
        list[Path] | None,
        typer.Argument(metavar="ENGINE_DIR...", help="Directories written by build-engine; those that cannot run here are skipped."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(
            help="Baselines, separated by commas: the float model in torch, torch-bf16, torch-fp16, openvino-fp32, openvino-bf16, ort-fp32; "
            "nncf-int8 (pip install nncf)."
        ),
    ] = "torch",
    batch: Annotated[int, typer.Option(help="Samples per call.")] = 16,
    rounds: Annotated[int, typer.Option(help="Measurements of each engine and baseline, made alternately.")] = 20,
    threads: Annotated[int | None, typer.Option(help="CPU threads of torch. Default: all cores.")] = None,
    finetune_step: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure one fine-tuning step of this model instead of engines.")
    ] = None,
    kernels: opt.TrainingKernels = opt.Kernels.AUTO,
    device: opt.EngineDevice = None,
    as_json: opt.Json = False,
) -> None:
    """Time engines and float baselines alternately in one process; prints medians and speed ratios."""
    from edm_deploy.errors import InputError

    result: Bench | TrainingCost
    if finetune_step:
        from edm_deploy_tools.benchmarks.finetune_step import bench_finetune_step

        if engines or device:
            raise InputError("--finetune-step measures a training step on the CPU, without engines or --device. Leave them or it out.")
        result = bench_finetune_step(finetune_step, batch=batch, rounds=rounds, threads=threads, kernels=kernels.value)
    else:
        from edm_deploy_tools.benchmarks.engines import bench_engines

        if kernels is not opt.Kernels.AUTO:
            raise InputError("--kernels is for --finetune-step: engines have their own. Leave it out.")
        result = bench_engines(
            engines or [],
            against=[name for name in against.split(",") if name],
            batch=batch,
            rounds=rounds,
            threads=threads,
            device=opt.value(device),
        )
    if as_json:
        console.print_json(result.to_json())
        return
    console.print_facts(result.conditions)
    console.print_table("Medians of alternating measurements", result.rows())
