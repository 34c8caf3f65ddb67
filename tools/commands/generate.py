"""The command `generate`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from edm_deploy_tools.common import console
from edm_deploy_tools.common import options as opt


class ShardFormat(StrEnum):
    """Format of a shard."""

    WEBDATASET = "webdataset"
    PARQUET = "parquet"


def generate(
    engine: opt.Engine,
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", callback=opt.check_out, help="Folder of the shards. A run that was killed is continued there."
        ),
    ],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE", help="Text file with one prompt a line, one image each.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", metavar="N", help="Number of images; prompts are used in turn. Default: one for each prompt."),
    ] = None,
    workers: Annotated[int, typer.Option("--workers", metavar="N", help="Workers with an engine each; several run on Ray.")] = 1,
    threads: Annotated[int, typer.Option("--threads", metavar="N", help="CPU threads of each worker's engine.")] = 1,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Ray cluster: HOST:PORT, ray://HOST:PORT, auto, or local to start one. Default: local."
        ),
    ] = None,
    shard_format: Annotated[
        ShardFormat, typer.Option("--format", help="webdataset: tar files of PNG and JSON; parquet.")
    ] = ShardFormat.WEBDATASET,
    shard_images: Annotated[int, typer.Option("--shard-images", metavar="N", help="Images of a shard.")] = 64,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", metavar="N", help="Samples of each denoiser call; a guided image is two. Default: that of the engine's profile."
        ),
    ] = None,
    negative_prompt: opt.NegativePrompt = None,
    class_label: Annotated[
        list[int] | None, typer.Option("--class-label", metavar="N", help="Classes, used in turn; repeatable. Default: at random by image.")
    ] = None,
    guidance: opt.Guidance = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels, within the engine's profile.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, within the engine's profile.")] = None,
    steps: Annotated[int, typer.Option(help="Inference steps.")] = 20,
    scheduler: Annotated[str | None, typer.Option(help="As in sample. Default: the pipeline's; ddim for a pixel-space model.")] = None,
    seed: Annotated[int, opt.seed_option("Base seed; the seed of an image is derived from it and the image's index.")] = 0,
    source: opt.PipelineSource = None,
    lora: opt.Loras = None,
    device: opt.EngineDevice = None,
    overwrite: opt.Overwrite = False,
    as_json: opt.Json = False,
) -> None:
    """Generate many images as WebDataset or Parquet shards, by any number of workers; run again to continue after an interruption."""
    from edm_deploy.errors import InputError
    from edm_deploy.pipelines.prompt_file import read_prompts
    from edm_deploy_tools.common.loras import file_and_weight
    from edm_deploy_tools.generation.generate import generate_images
    from edm_deploy_tools.generation.plan import plan_of
    from edm_deploy_tools.images.pipeline_arguments import GenerationRequest

    if prompts is None and num_images is None:
        raise InputError("generate needs a number of images: give --num-images N, or --prompts FILE for one image of each prompt.")
    request = GenerationRequest(
        prompts=() if prompts is None else read_prompts(prompts),
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
    plan = plan_of(
        engine,
        request,
        loras=[file_and_weight(text) for text in lora or ()],
        batch=batch,
        source=source,
        device=opt.value(device),
        threads=threads,
        shard_images=shard_images,
        shard_format=shard_format.value,
    )
    with console.progress() as progress:
        result = generate_images(plan, out, workers=workers, ray=ray, overwrite=overwrite, progress=progress)
    if result.truncated:
        console.note(f"Note: {result.truncated} of {result.made} images have a prompt that the text encoder truncated.")
    if as_json:
        console.print_json(
            {"out": str(out), "images": result.count, "made": result.made, "shards": result.shards, "seconds": result.seconds}
        )
        return
    before = f", {result.count - result.made} of them by earlier runs" if result.made < result.count else ""
    console.wrote(out, f"{result.count} images in {result.shards} shards{before}")
    if result.made:
        console.say(f"{result.seconds / result.made:.3f} s per image ({result.made} images in {console.time_words(result.seconds)})")
