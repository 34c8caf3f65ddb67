"""The command `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def evaluate(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="ARTIFACT_OR_ENGINE...", help="Directories to evaluate, several in one report; or sets of images of generate."
        ),
    ],
    out: opt.Out,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Float model to compare with. Default: the model that the artifact was made from.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of sampling trajectories of each seed.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of DDIM, or of Euler for a flow-matching model.")] = 20,
    seed: opt.EvaluationSeeds = None,
    guidance: opt.Guidance = None,
    prompts: opt.Prompts = None,
    device: opt.EngineDevice = None,
    low_memory: opt.LowMemory = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Metrics of the final images in addition: fid, precision, recall; with --inception also sfid and is. By commas.",
        ),
    ] = None,
    inception: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Weights of the FID's Inception network, from convert_inception. Default: the features of the shipped network.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Images that --metrics compares with: a folder, or a set of generate. Default: the float model's samples from the same noise.",
        ),
    ] = None,
    lora: opt.Loras = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Measure the error of artifacts and engines against the float model; writes report.json and report.html.

    With --lora the float model has the same LoRAs.
    """
    from edm_deploy.errors import InputError
    from edm_deploy.pipelines.prompt_file import read_prompts
    from edm_deploy_tools.common.loras import file_and_weight
    from edm_deploy_tools.evaluation.evaluate import evaluate_paths
    from edm_deploy_tools.evaluation.image_metrics import MetricRequest, metric_names
    from edm_deploy_tools.evaluation.image_sets import are_image_sets, evaluate_image_sets
    from edm_deploy_tools.evaluation.results import describe_settings, headline
    from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

    opt.check_new(out, overwrite)
    texts = () if prompts is None else read_prompts(prompts)
    settings = EvaluationSettings(
        samples=samples,
        steps=steps,
        seeds=opt.evaluation_seeds(seed),
        guidance=guidance,
        prompts=texts,
        loras=tuple(map(file_and_weight, lora or ())),
    )
    request = None
    if metrics is not None:
        request = MetricRequest(names=metric_names(metrics), inception=inception, images=images)
    elif inception is not None or images is not None:
        raise InputError("--inception and --images are for --metrics. Add --metrics, for example --metrics fid, or leave them out.")
    if are_image_sets(paths):
        rows = evaluate_image_sets(paths, out, request)
        if as_json:
            console.print_json({"sets": rows})
            return
        console.print_table(f"Against {images}", [{name: value for name, value in row.items() if name != "settings"} for row in rows])
        console.wrote(out / "metrics.json", "all figures")
        return
    report = evaluate_paths(
        paths, out, reference=reference, settings=settings, device=opt.value(device), low_memory=low_memory, metrics=request
    )
    if as_json:
        console.print_json(report.to_json())
        return
    console.print_table(f"Against {report.reference.name}", headline(report))
    console.say(describe_settings(report))
    console.wrote(out / "report.json", "all figures")
    console.wrote(out / "report.html", "the same figures with charts and images")
