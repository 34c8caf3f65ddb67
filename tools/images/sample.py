"""Images out of an engine: single PNGs and one grid."""

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

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.model_index import COMPONENTS, INDEX
from edm_deploy.pipelines.rebuild import without_loading_messages
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_pipeline
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.storage.directories import check_replaceable, new_directory, other_components, read_json
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest, PipelineArguments

log = logging.getLogger(__name__)

GRID_NAME = "grid.png"
NUM_IMAGES = 16
SMALLEST_TILE = 96  # pixels; a 32-pixel image is shown three times its size, without smoothing


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What `sample` made.

    Attributes:
        paths: The PNG files, the grid first.
        seconds: Wall time of the sampling, loading apart.
        count: Number of images.
        size: Width and height in pixels.
        scheduler: The diffusers class that walked, without its last word.
    """

    paths: tuple[Path, ...]
    seconds: float
    count: int
    size: tuple[int, int]
    scheduler: str

    @property
    def seconds_per_image(self) -> float:
        """Mean wall time of one image."""
        return self.seconds / self.count


def sample(
    engine: Path,
    out: Path,
    *,
    num_images: int | None = None,
    steps: int = 20,
    scheduler: str | None = None,
    seed: int = 0,
    told: GenerationRequest | None = None,
    source: str | Path | None = None,
    device: str | None = None,
) -> Sampled:
    """Draw images from an engine into directory `out`, whole or not at all.

    Args:
        engine: An engine directory.
        out: Directory to write grid.png and 000.png, 001.png, ... to.
        num_images: How many, drawn in batches that the engine's profile allows; None is one for each prompt or label, or 16.
        steps: Inference steps.
        scheduler: As edm_deploy.pipelines.source.SCHEDULERS names them; None is DDIM for a model of pixels, else the source pipeline's own.
        seed: Of the noise.
        told: Prompts, labels, guidance, size.
        source: Directory or hub id of the pipeline whose text encoders and VAE are taken; None as load_pipeline.
        device: Where the engine runs; None is where its backend runs.

    Raises:
        InputError: num_images or steps is below 1, or the pipeline does not take what it is told.
        ArtifactError, UnsupportedError: As load_pipeline.
    """
    told = told or GenerationRequest()
    count = len(told.prompts or told.labels) or NUM_IMAGES if num_images is None else num_images
    if count < 1 or steps < 1:
        raise InputError(f"{count} images in {steps} steps: expected at least 1 of each.")
    check_replaceable(out, marker=GRID_NAME)
    pipe = load_pipeline(engine, scheduler=scheduler or default_scheduler(engine), device=device, source=source)
    start = time.perf_counter()
    images = draw(pipe, count, steps=steps, seed=seed, told=told)
    seconds = time.perf_counter() - start
    with new_directory(out, marker=GRID_NAME) as directory:
        grid_of(images).save(directory / GRID_NAME)
        for index, image in enumerate(images):
            image.save(directory / f"{index:03d}.png")
    names = [GRID_NAME, *(f"{index:03d}.png" for index in range(count))]
    return Sampled(
        paths=tuple(out / name for name in names),
        seconds=seconds,
        count=count,
        size=images[0].size,
        scheduler=type(pipe.scheduler).__name__.removesuffix("Scheduler"),
    )


def default_scheduler(engine: Path) -> str | None:
    """DDIM for models of pixels, whose own scheduler is mostly DDPM: it needs its thousand steps. None, the pipeline's own, for others."""
    index = read_json(engine / INDEX, what="engine") if (engine / INDEX).is_file() else {}
    return None if any(other_components(index, component) for component in COMPONENTS if component in index) else "ddim"


def draw(pipe: Any, num_images: int, *, steps: int, seed: int, told: GenerationRequest | None = None) -> list[Image.Image]:
    """`num_images` images of a pipeline around an engine, in batches that its profile allows.

    Labels that a model needs and is not told are drawn from the seed; a prompt that is cut off is said aloud.

    Raises:
        InputError: The pipeline does not take what it is told.
    """
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if not isinstance(denoiser, EngineDenoiser):
        raise UnsupportedError(f"{type(pipe).__name__} has no engine in it; load it with edm_deploy.load_pipeline.")
    telling = PipelineArguments(pipe, denoiser, told or GenerationRequest())
    for note in telling.notes():
        log.warning("%s", note)
    allowed = telling.images_at_once(denoiser.manifest.profile.get("batch", ShapeRange(1, 2 * num_images, 2 * num_images)))
    generator = torch.Generator().manual_seed(seed)
    images: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for size in batch_sizes(num_images, allowed):
        arguments = telling.arguments(len(images), size, generator)
        with without_loading_messages():  # a prompt that is cut off has been said
            images += pipe(num_inference_steps=steps, generator=generator, **arguments).images
    return images[:num_images]


def batch_sizes(count: int, allowed: ShapeRange) -> list[int]:
    """Sizes of batches, each within `allowed`, that hold at least `count` samples together: 20 with 1:8:16 is [16, 4]."""
    full, rest = divmod(count, allowed.max)
    return [allowed.max] * full + ([max(rest, allowed.min)] if rest else [])


def grid_of(images: Sequence[Image.Image], *, columns: int | None = None) -> Image.Image:
    """One picture of all images, row by row, small ones enlarged without smoothing."""
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
