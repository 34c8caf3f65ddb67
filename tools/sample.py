"""Images out of an engine: single PNGs and one grid."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from edm_deploy.denoiser import EngineDenoiser, load_pipeline
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.files import new_directory
from edm_deploy.manifest import Range

GRID_NAME = "grid.png"
SMALLEST_TILE = 96  # pixels; a 32-pixel image is shown three times its size, without smoothing


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """What `sample` made.

    Attributes:
        paths: The PNG files, the grid first.
        seconds: Wall time of the sampling, loading apart.
        count: Number of images.
        size: Width and height in pixels.
    """

    paths: tuple[Path, ...]
    seconds: float
    count: int
    size: tuple[int, int]

    @property
    def seconds_per_image(self) -> float:
        """Mean wall time of one image."""
        return self.seconds / self.count


def sample(
    engine: Path,
    out: Path,
    *,
    num_images: int = 16,
    steps: int = 20,
    scheduler: str | None = "ddim",
    seed: int = 0,
    device: str | None = None,
) -> Sampled:
    """Draw images from an engine into directory `out`, whole or not at all.

    Args:
        engine: An engine directory.
        out: Directory to write grid.png and 000.png, 001.png, ... to.
        num_images: How many; drawn in batches that the engine's profile allows.
        steps: Inference steps.
        scheduler: As edm_deploy.pipelines.SCHEDULERS names them; None is the source pipeline's own.
        seed: Of the noise.
        device: Where the engine runs; None is where its backend runs.

    Raises:
        InputError: num_images or steps is below 1.
        ArtifactError, UnsupportedError: As load_pipeline.
    """
    if num_images < 1 or steps < 1:
        raise InputError(f"{num_images} images in {steps} steps: expected at least 1 of each.")
    pipe = load_pipeline(engine, scheduler=scheduler, device=device)
    start = time.perf_counter()
    images = draw(pipe, num_images, steps=steps, seed=seed)
    seconds = time.perf_counter() - start
    with new_directory(out, marker=GRID_NAME) as directory:
        grid_of(images).save(directory / GRID_NAME)
        for index, image in enumerate(images):
            image.save(directory / f"{index:03d}.png")
    names = [GRID_NAME, *(f"{index:03d}.png" for index in range(num_images))]
    return Sampled(paths=tuple(out / name for name in names), seconds=seconds, count=num_images, size=images[0].size)


def draw(pipe: Any, num_images: int, *, steps: int, seed: int) -> list[Image.Image]:
    """`num_images` images of a pipeline around an engine, in batches that its profile allows; class labels are drawn from the seed."""
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    if not isinstance(denoiser, EngineDenoiser):
        raise UnsupportedError(f"{type(pipe).__name__} has no engine in it; load it with edm_deploy.load_pipeline.")
    generator = torch.Generator().manual_seed(seed)
    batches = batch_sizes(num_images, denoiser.manifest.profile.get("batch", Range(1, num_images, num_images)))
    images: list[Image.Image] = []
    pipe.set_progress_bar_config(disable=True)
    for size in batches:
        drawn = denoiser.family.random_conditioning(denoiser.manifest.config, size, generator)
        conditioning = {name: value.to(denoiser.device) for name, value in drawn.items()}
        images += pipe(batch_size=size, num_inference_steps=steps, generator=generator, **conditioning).images
    return images[:num_images]


def batch_sizes(count: int, allowed: Range) -> list[int]:
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
