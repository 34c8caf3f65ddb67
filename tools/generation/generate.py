"""Generate a set of images: the missing shards of a folder, in this process or by workers on Ray."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edm_deploy.errors import EdmDeployError, InputError
from edm_deploy_tools.generation.image_set import ImageSet, opened
from edm_deploy_tools.generation.plan import GenerationPlan
from edm_deploy_tools.generation.worker import ShardWorker
from edm_deploy_tools.images.shards import ShardRange


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Progress of a run, as `console.progress` shows it.

    Attributes:
        stage: What is being made.
        step, total: Images that exist, and all of the set.
        rate: Images a second of this run; None at its start.
        eta_seconds: Expected seconds to the end; None at the start.
        loss, memory_bytes: Not measured.
    """

    stage: str
    step: int
    total: int
    rate: float | None = None
    eta_seconds: float | None = None
    loss: None = None
    memory_bytes: None = None


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Result of `generate_images`.

    Attributes:
        count: Images of the set.
        made: Images that this run made.
        shards: Number of shards.
        seconds: Wall time of this run, with the start of workers.
        truncated: Images whose prompt was truncated by the text encoder.
        workers: Process ids of the workers.
    """

    count: int
    made: int
    shards: int
    seconds: float
    truncated: int
    workers: tuple[int, ...]


def generate_images(
    plan: GenerationPlan,
    out: Path,
    *,
    workers: int = 1,
    ray: str | None = None,
    overwrite: bool = False,
    progress: Callable[[Progress], None] = lambda _: None,
) -> Generated:
    """Make the images of a plan that `out` lacks. A killed run is continued by calling this again with the same plan.

    Args:
        plan: The plan.
        out: Folder of the shards; where workers run on several machines, one that all of them reach.
        workers: Number of workers, each with an engine. One without `ray` runs in this process.
        ray: Address of a Ray cluster, or `local` to start one in this process; None is `local` for several workers.
        overwrite: Whether a set in `out` is removed first.
        progress: Called after each shard.

    Raises:
        InputError: Fewer than one worker, a set of other settings in `out`, or the pipeline does not accept the request.
        ArtifactError, UnsupportedError: As `edm_deploy.load_pipeline`; or Ray is not installed or not reachable.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: expected 1 or more.")
    with opened(plan, out, overwrite=overwrite) as images:
        kept = sum(shard.stop - shard.start for shard in images.done)
        with contextlib.closing(_rows(images, workers, ray)) as rows:
            return _followed(images, rows, kept, progress)


def _rows(images: ImageSet, workers: int, ray: str | None) -> Generator[dict[str, Any]]:
    """The rows of the worker or workers that make the missing shards."""
    if not images.missing:
        return
    if workers == 1 and ray is None:
        yield from in_this_process(images.plan, images.directory, images.missing)
        return
    from edm_deploy_tools.generation.on_ray import on_ray

    yield from on_ray(images.plan, images.directory, images.missing, workers=workers, address=ray)


def in_this_process(plan: GenerationPlan, out: Path, missing: list[ShardRange]) -> Iterator[dict[str, Any]]:
    """Make shards by a worker in this process; yields its rows."""
    worker = ShardWorker(plan, out)
    for shard in missing:
        columns = worker({"start": np.array([shard.start]), "stop": np.array([shard.stop])})
        yield {name: values[0] for name, values in columns.items()}


def _followed(images: ImageSet, rows: Iterable[dict[str, Any]], kept: int, progress: Callable[[Progress], None]) -> Generated:
    """Enter each shard that was made, and write the description of the complete set; an error of a worker is raised here."""
    total, count, truncated = images.plan.request.count, kept, 0
    workers: set[int] = set()
    start = time.monotonic()
    first: tuple[float, int] | None = None  # time and count of the first row: workers take long to start
    for row in rows:
        if row["error"]:
            raise EdmDeployError(str(row["error"]))
        shard = ShardRange(int(row["start"]), int(row["stop"]))
        images.done[shard] = str(row["sha256"])
        truncated += int(row["truncated"])
        workers.add(int(row["pid"]))
        count += shard.stop - shard.start
        now = time.monotonic()
        if first is None:
            first = now, count
            progress(Progress(stage="generate", step=count, total=total))
        else:
            rate = (count - first[1]) / max(now - first[0], 1e-9)
            progress(Progress(stage="generate", step=count, total=total, rate=rate, eta_seconds=(total - count) / rate))
    assert not images.missing, f"no worker made {images.missing[0]}"
    images.write()
    return Generated(
        count=total,
        made=count - kept,
        shards=len(images.plan.shards),
        seconds=time.monotonic() - start,
        truncated=truncated,
        workers=tuple(sorted(workers)),
    )
