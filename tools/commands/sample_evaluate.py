"""The commands that show what an engine or an artifact is worth: `sample` and `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.commands import options as opt
from edm_deploy_tools.common import console


def sample(
    engine: opt.Engine,
    out: opt.Out,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What a picture shows; may be given again.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="The same from a file, one prompt a line.")] = None,
    negative_prompt: Annotated[str | None, typer.Option("--negative-prompt", metavar="TEXT", help="What no picture shows.")] = None,
    class_label: Annotated[
        list[int] | None, typer.Option("--class-label", metavar="N", help="Class of a picture; may be given again. Default: random ones.")
    ] = None,
    guidance: opt.Guidance = None,
    height: Annotated[
        int | None, typer.Option(help="In pixels, within the engine's profile. Default: as --width, or the model's own.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Likewise, as --height.")] = None,
    num_images: Annotated[int | None, typer.Option(help="How many images. Default: one for each prompt or class, or 16.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 20,
    scheduler: Annotated[
        str | None,
        typer.Option(help="ddim, ddpm, dpm-solver++, euler, unipc, flow-euler or flow-heun. Default: the pipeline's own; ddim for pixels."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    source: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Pipeline that has the text encoders and the VAE, where the engine's folder has none."),
    ] = None,
    device: opt.EngineDevice = None,
    as_json: opt.Json = False,
) -> None:
    """Draw images from an engine: single PNGs and grid.png."""
    from calibration.data.prompts import prompts_of
    from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
    from edm_deploy_tools.images.sample import sample as draw

    told = GenerationRequest(
        prompts=(*(prompt or ()), *(() if prompts is None else prompts_of(prompts))),
        negative_prompt=negative_prompt,
        labels=tuple(class_label or ()),
        guidance=guidance,
        height=height,
        width=width,
    )
    result = draw(
        engine,
        out,
        num_images=num_images,
        steps=steps,
        scheduler=scheduler,
        seed=seed,
        told=told,
        source=source,
        device=opt.value(device),
    )
    if as_json:
        console.print_json(
            {"out": str(out), "images": result.count, "seconds": result.seconds, "seconds_per_image": result.seconds_per_image}
        )
        return
    console.wrote(out, f"{result.count} images of {result.size[0]}x{result.size[1]} and {result.paths[0].name}")
    console.say(
        f"{result.seconds_per_image:.3f} s per image ({steps} steps of {result.scheduler}, {result.count} images in {result.seconds:.1f} s)"
    )


def evaluate(
    paths: Annotated[
        list[Path], typer.Argument(metavar="ARTIFACT_OR_ENGINE...", help="What to judge; several stand side by side in the report.")
    ],
    out: opt.Out,
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The float model; default: the one that the artifact was made from.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Trajectories.")] = 16,
    steps: Annotated[int, typer.Option(help="Steps of DDIM, or of Euler for flow matching.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 123,
    guidance: opt.Guidance = None,
    prompts: opt.Prompts = None,
    device: opt.EngineDevice = None,
    low_memory: opt.LowMemory = False,
    as_json: opt.Json = False,
) -> None:
    """Measure how far artifacts or engines are from the float model; writes report.json and report.html."""
    from calibration.data.prompts import prompts_of
    from edm_deploy_tools.evaluation.evaluate import evaluate_paths
    from edm_deploy_tools.evaluation.results import conditions, headline
    from edm_deploy_tools.evaluation.trajectory_error import EvaluationSettings

    told = () if prompts is None else prompts_of(prompts)
    setup = EvaluationSettings(samples=samples, steps=steps, seed=seed, guidance=guidance, prompts=told)
    report = evaluate_paths(paths, out, reference=reference, setup=setup, device=opt.value(device), low_memory=low_memory)
    if as_json:
        console.print_json(report.to_json())
        return
    console.print_table(f"Against {report.reference.name}", headline(report))
    console.say(conditions(report))
    console.wrote(out / "report.json", "every figure")
    console.wrote(out / "report.html", "the same to look at")
