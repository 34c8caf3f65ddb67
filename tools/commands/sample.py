"""The command `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


def sample(
    engine: opt.Engine,
    out: opt.Out,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="Prompt of an image; repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option("--prompts", metavar="FILE", help="Text file with one prompt a line.")] = None,
    negative_prompt: opt.NegativePrompt = None,
    class_label: Annotated[
        list[int] | None,
        typer.Option("--class-label", metavar="N", help="Class of an image, from 0; repeatable. Default: drawn at random from --seed."),
    ] = None,
    guidance: opt.Guidance = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels, within the engine's profile. Default: --width, or the model's native size.")
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels, within the engine's profile. Default: --height, or the model's native size.")
    ] = None,
    num_images: Annotated[int | None, typer.Option(help="Number of images. Default: one for each prompt or class label, or 16.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 20,
    scheduler: Annotated[
        str | None,
        typer.Option(
            help="ddim, ddpm, dpm-solver++, euler, unipc, flow-euler or flow-heun. Default: the pipeline's; ddim for a pixel-space model."
        ),
    ] = None,
    seed: Annotated[int, opt.seed_option("Seed of the initial noise.")] = 0,
    source: opt.PipelineSource = None,
    lora: opt.Loras = None,
    device: opt.EngineDevice = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Sample images from an engine: PNG files and grid.png."""
    from edm_deploy.pipelines.prompt_file import read_prompts
    from edm_deploy_tools.common.loras import file_and_weight
    from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
    from edm_deploy_tools.images.sample import sample_images

    opt.check_new(out, overwrite)
    request = GenerationRequest(
        prompts=(*(prompt or ()), *(() if prompts is None else read_prompts(prompts))),
        negative_prompt=negative_prompt,
        labels=tuple(class_label or ()),
        guidance=guidance,
        height=height,
        width=width,
        num_images=num_images,
        steps=steps,
        scheduler=scheduler,
        seed=seed,
    )
    loras = [file_and_weight(text) for text in lora or ()]
    result = sample_images(engine, out, request, source=source, device=opt.value(device), loras=loras)
    if as_json:
        console.print_json(
            {"out": str(out), "images": result.count, "seconds": result.seconds, "seconds_per_image": result.seconds_per_image}
        )
        return
    console.wrote(out, f"{result.count} images of {result.size[0]}x{result.size[1]} and {result.paths[0].name}")
    console.say(
        f"{result.seconds_per_image:.3f} s per image ({steps} steps of {result.scheduler}, {result.count} images in {result.seconds:.1f} s)"
    )
