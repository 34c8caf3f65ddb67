"""Sample images from an engine: one PNG file for each image, and all of them in one grid."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edm_deploy import models
from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.pipelines.rebuild import index_with_components, without_loading_messages
from edm_deploy.pipelines.schedulers import default_scheduler
from edm_deploy.registry import names
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_pipeline
from edm_deploy.runtime.manifest import NAME as MANIFEST
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.storage.directories import INDEX_FILE, read_json
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest, PipelineArguments

log = logging.getLogger(__name__)

GRID_NAME = "grid.png"
IMAGES = DirectoryKind("a directory of images", GRID_NAME, ("[0-9][0-9][0-9]*.png",))
SMALLEST_TILE = 96  # pixels; a 32-pixel image is shown three times its size, without smoothing


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """The result of `sample_images`.

    Attributes:
        paths: The PNG files, the grid first.
        seconds: Wall time of the sampling, without loading.
        count: Number of images.
        size: Width and height in pixels.
        scheduler: Name of the diffusers scheduler class, without the suffix `Scheduler`.
    """

    paths: tuple[Path, ...]
    seconds: float
    count: int
    size: tuple[int, int]
    scheduler: str

    @property
    def seconds_per_image(self) -> float:
        """Mean wall time per image."""
        return self.seconds / self.count


def sample_images(
    engine: Path,
    out: Path,
    request: GenerationRequest | None = None,
    *,
    source: str | Path | None = None,
    device: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
) -> Sampled:
    """Sample images from an engine into directory `out`, which is written completely or not at all.

    Args:
        engine: An engine directory.
        out: Directory for grid.png and 000.png, 001.png, ...
        request: Number of images, steps, scheduler, seed, prompts, labels, guidance, size; None takes the defaults.
        source: Directory or hub id of the pipeline that provides text encoders and VAE; None as in load_pipeline.
        device: Where the engine runs; None is the default device of its backend.
        loras: Files of LoRAs for the denoiser, with their weights.

    Raises:
        InputError: The pipeline does not accept part of the request, or the engine not a LoRA.
        ArtifactError, UnsupportedError: As load_pipeline.
    """
    request = request or GenerationRequest()
    check_output(out, kind=IMAGES)
    check_components(engine, source)
    pipe = load_pipeline(engine, scheduler=request.scheduler or default_scheduler(engine), device=device, source=source)
    for path, weight in loras:
        denoiser_of(pipe).load_lora(path, weight=weight)
    start = time.perf_counter()
    images = draw(pipe, request)
    seconds = time.perf_counter() - start
    with new_directory(out, kind=IMAGES) as directory:
        grid_of(images).save(directory / GRID_NAME)
        for index, image in enumerate(images):
            image.save(directory / f"{index:03d}.png")
    files = [GRID_NAME, *(f"{index:03d}.png" for index in range(len(images)))]
    return Sampled(
        paths=tuple(out / name for name in files),
        seconds=seconds,
        count=len(images),
        size=images[0].size,
        scheduler=type(pipe.scheduler).__name__.removesuffix("Scheduler"),
    )


def check_components(engine: Path, source: str | Path | None) -> None:
    """Refuse an engine whose model needs conditioning that its pipeline does not provide, before any weights are loaded.

    Raises:
        UnsupportedError: As index_with_components.
    """
    manifest = read_json(engine / MANIFEST, what="engine")
    if manifest.get("kind") == "engine" and manifest.get("family") in names(models) and (engine / INDEX_FILE).is_file():
        index_with_components(engine, family_named(manifest["family"]), manifest.get("config", {}), source)


def draw(pipe: Any, request: GenerationRequest) -> list[Image.Image]:
    """Sample the requested images with a pipeline around an engine, in batches that the engine's profile allows.

    Labels that a model needs and the request lacks are drawn at random from the seed. A truncated prompt is logged as a warning.

    Raises:
        InputError: The pipeline does not accept part of the request.
        UnsupportedError: The pipeline's denoiser is not an engine.
    """
    denoiser = denoiser_of(pipe)
    arguments = PipelineArguments(pipe, denoiser, request)
    for note in arguments.notes():
        log.warning("%s", note)
    count = request.count
    allowed = arguments.images_at_once(denoiser.manifest.profile.get("batch", ShapeRange(1, 2 * count, 2 * count)))
    generator = torch.Generator().manual_seed(request.seed)
    images: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for size in batch_sizes(count, allowed):
        keywords = arguments.keywords(len(images), size, generator)
        with without_loading_messages():  # a truncated prompt was logged above
            images += pipe(num_inference_steps=request.steps, generator=generator, **keywords).images
    return images[:count]


def denoiser_of(pipe: Any) -> EngineDenoiser:
    """The engine of a pipeline; UnsupportedError where its denoiser is none."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if not isinstance(denoiser, EngineDenoiser):
        raise UnsupportedError(f"The denoiser of this {type(pipe).__name__} is no engine. Load the pipeline with edm_deploy.load_pipeline.")
    return denoiser


def batch_sizes(count: int, allowed: ShapeRange) -> list[int]:
    """Batch sizes, each within `allowed`, that together hold at least `count` samples: 20 with 1:8:16 gives [16, 4]."""
    full, rest = divmod(count, allowed.max)
    return [allowed.max] * full + ([max(rest, allowed.min)] if rest else [])


def grid_of(images: Sequence[Image.Image], *, columns: int | None = None) -> Image.Image:
    """All images in one, row by row; small ones are enlarged without smoothing."""
    columns = columns or math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    factor = max(1, SMALLEST_TILE // max(width, height))
    width, height, gap = width * factor, height * factor, 4
    rows = math.ceil(len(images) / columns)
    grid = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for index, image in enumerate(images):
        tile = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
        grid.paste(tile, ((index % columns) * (width + gap), (index // columns) * (height + gap)))
    return grid
