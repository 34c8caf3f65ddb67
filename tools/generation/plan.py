"""The plan of a set of images: every setting that decides an image, and how the images are cut into shards and batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edm_deploy.errors import InputError
from edm_deploy.runtime.manifest import NAME as MANIFEST
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.storage.directories import sha256_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.shards import FORMATS, ShardRange, shard_ranges

SHARD_IMAGES = 64  # of a shard by default: what a killed worker has to make again
MOST_IMAGES = 10**9 - 1  # an index has nine digits in names


@dataclass(frozen=True, kw_only=True)
class GenerationPlan:
    """What every worker is given: engine, request and layout of the set. Everything in it is a JSON value, a path or a tuple of these.

    Attributes:
        engine: Directory of the engine, by a path that every worker has.
        engine_digest: sha256 of its manifest, which has the hashes of its files.
        request: The images; image `i` has prompt `i modulo P` or label `i modulo L`, and a seed of its own.
        source: As in `edm_deploy.load_pipeline`.
        loras: Files of LoRAs with their sha256 and weights.
        device: Where engines run; None is the default device of the backend.
        threads: CPU threads of each worker's engine.
        batch: Samples of each denoiser call; a guided image is two.
        shard_images: Images of a shard.
        shard_format: `webdataset` or `parquet`.
    """

    engine: Path
    engine_digest: str
    request: GenerationRequest
    source: str | None = None
    loras: tuple[tuple[Path, str, float], ...] = ()
    device: str | None = None
    threads: int = 1
    batch: int
    shard_images: int = SHARD_IMAGES
    shard_format: str = "webdataset"

    def __post_init__(self) -> None:
        if self.request.count > MOST_IMAGES:
            raise InputError(f"--num-images {self.request.count}: expected at most {MOST_IMAGES}. Generate several sets with other seeds.")
        for option, value in (("--threads", self.threads), ("--batch", self.batch), ("--shard-images", self.shard_images)):
            if value < 1:
                raise InputError(f"{option} {value}: expected 1 or more.")
        if self.shard_format not in FORMATS:
            raise InputError(f"--format {self.shard_format}: expected {' or '.join(FORMATS)}.")

    @property
    def shards(self) -> list[ShardRange]:
        """The shards of the set."""
        return shard_ranges(self.request.count, self.shard_images)

    def settings(self) -> dict[str, Any]:
        """What decides the images and their files, without their number and without paths, as JSON values by name.

        Threads are among them: a vendor may sum in another order with another number of them.
        """
        request = asdict(self.request)
        del request["num_images"]
        return {
            "engine": self.engine_digest,
            **request,
            "prompts": digest_of(self.request.prompts),
            "labels": list(self.request.labels),
            "loras": [[digest, weight] for _, digest, weight in self.loras],
            "source": self.source,
            "device": self.device,
            "threads": self.threads,
            "batch": self.batch,
            "shard_images": self.shard_images,
            "format": self.shard_format,
        }

    @property
    def settings_digest(self) -> str:
        """sha256 of `settings`."""
        return digest_of(self.settings())


def digest_of(content: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def engine_digest(engine: Path) -> str:
    """sha256 of an engine's manifest, which lists the sha256 of every other file."""
    return sha256_of(engine / MANIFEST)


def plan_of(
    engine: Path,
    request: GenerationRequest,
    *,
    loras: Sequence[tuple[Path, float]] = (),
    batch: int | None = None,
    **layout: Any,  # the other fields of GenerationPlan
) -> GenerationPlan:
    """The plan for an engine, which is checked as far as its manifest goes.

    Args:
        engine: Directory of the engine.
        request: The images.
        loras: Files of LoRAs with their weights.
        batch: Samples of each denoiser call; None is the batch that the engine was optimised for.
        layout: The other fields of GenerationPlan.

    Raises:
        ArtifactError: `engine` is no engine directory.
        InputError: A batch outside the engine's profile, or a number outside its range.
    """
    manifest = Manifest.read(engine, kind="engine")
    allowed = manifest.profile.get("batch", ShapeRange(1, 1, 1))
    chosen = allowed.opt if batch is None else batch
    if not allowed.min <= chosen <= allowed.max:
        raise InputError(
            f"--batch {chosen} is outside the engine's profile {allowed.min}:{allowed.opt}:{allowed.max}. Choose a batch within it."
        )
    return GenerationPlan(
        engine=engine.resolve(),
        engine_digest=engine_digest(engine),
        request=request,
        loras=tuple((path.resolve(), sha256_of(path), weight) for path, weight in loras),
        batch=chosen,
        **layout,
    )


def first_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first setting, in alphabetical order, that differs, with both values; None if all agree."""
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            return f"{name} {_short(before.get(name))} there, {_short(now.get(name))} here"
    return None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else f"{text[:20]}..."
