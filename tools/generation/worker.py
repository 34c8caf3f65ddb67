"""A worker: it opens an engine once, and makes shards. The same class runs in this process and as an actor of Ray Data."""

from __future__ import annotations

import io
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from edm_deploy.errors import ArtifactError, EdmDeployError, InputError
from edm_deploy.numerics.seeds import derived_seed
from edm_deploy.pipelines.prompt_encoding import truncated_prompts
from edm_deploy.pipelines.rebuild import without_loading_messages
from edm_deploy.pipelines.schedulers import default_scheduler
from edm_deploy.runtime.load import load_pipeline
from edm_deploy.storage.directories import sha256_of
from edm_deploy_tools.common.machine import check_versions, versions
from edm_deploy_tools.generation.plan import GenerationPlan, engine_digest
from edm_deploy_tools.images.pipeline_arguments import PipelineArguments
from edm_deploy_tools.images.sample import check_components, denoiser_of
from edm_deploy_tools.images.shards import ImageRecord, ShardRange, write_shard


class ShardWorker:
    """Makes shards of a plan.

    A batch always has the plan's size and the same images at the same places: the last one of the set is filled up with the images that would follow. So
    an image depends on the plan and its index, and not on the number of images or on who makes it.

    Called by Ray Data as `map_batches` prescribes, with a batch of shards; one that cannot be made is a row with an `error` instead of an exception, which
    Ray would wrap and retry.

    Args:
        plan: The plan.
        out: Directory of the shards, which every worker reaches by this path.
        expected: Versions of packages that this process must have; None accepts any.
    """

    def __init__(self, plan: GenerationPlan, out: Path, expected: Mapping[str, str] | None = None) -> None:
        self.plan, self.out = plan, out
        self.problem: str | None = None
        torch.set_num_threads(plan.threads)
        try:
            check_versions(expected or {}, versions(), where=f"The worker on {platform.node()}")
            self._open()
        except EdmDeployError as err:
            self.problem = str(err)

    def _open(self) -> None:
        plan = self.plan
        if not plan.engine.is_dir():
            raise ArtifactError(
                f"{plan.engine} does not exist on {platform.node()}. Put the engine where every worker reaches it by this path."
            )
        if engine_digest(plan.engine) != plan.engine_digest:
            raise ArtifactError(
                f"{plan.engine} on {platform.node()} is another engine than at the start. Copy it again, or start anew with another --out."
            )
        check_components(plan.engine, plan.source)
        scheduler = plan.request.scheduler or default_scheduler(plan.engine)
        self.pipe = load_pipeline(plan.engine, scheduler=scheduler, device=plan.device, source=plan.source, threads=plan.threads)
        self.pipe.set_progress_bar_config(disable=True)
        denoiser = denoiser_of(self.pipe)
        for path, digest, weight in plan.loras:
            if sha256_of(path) != digest:
                raise ArtifactError(f"{path} on {platform.node()} is another file than at the start. Copy it again.")
            denoiser.load_lora(path, weight=weight)
        self.arguments = PipelineArguments(self.pipe, denoiser, plan.request)
        self.images_at_once = plan.batch // self.arguments.samples_per_image
        if self.images_at_once < 1:
            raise InputError(f"--batch {plan.batch}: guidance takes two samples an image. Give --batch 2 or more, or --guidance 1.")

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Make shards; rows are columns of a numpy array each, as `map_batches` passes them.

        Args:
            batch: int64 `start` and `stop` of each shard.

        Returns:
            `start`, `stop`, `sha256` of the file, `pid` of this process, `truncated` prompts, and `error`, empty where there is none.
        """
        rows = [self._row(ShardRange(int(start), int(stop))) for start, stop in zip(batch["start"], batch["stop"], strict=True)]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _row(self, wanted: ShardRange) -> dict[str, Any]:
        row = {"start": wanted.start, "stop": wanted.stop, "sha256": "", "pid": os.getpid(), "truncated": 0, "error": self.problem or ""}
        if self.problem is None:
            try:
                row |= {"sha256": self.make(wanted), "truncated": self._truncated(wanted)}
            except EdmDeployError as err:
                row["error"] = str(err)
            except OSError as err:
                row["error"] = (
                    f"{self.out} on {platform.node()} cannot be written: {err.strerror or err}. Free space, and run the command again."
                )
        return row

    def make(self, wanted: ShardRange) -> str:
        """Make and write one shard; returns the sha256 of its file."""
        records: list[ImageRecord] = []
        for first in range(wanted.start, wanted.stop, self.images_at_once):
            records += self._batch(first)
        path = self.out / wanted.name(self.plan.shard_format)
        write_shard(path, records[: wanted.stop - wanted.start], self.plan.shard_format)
        return sha256_of(path)

    def _batch(self, first: int) -> list[ImageRecord]:
        """`images_at_once` images from index `first` on, each from a generator of its own."""
        plan, indices = self.plan, range(first, first + self.images_at_once)
        seeds = [derived_seed(plan.request.seed, index) for index in indices]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        keywords = joined([self.arguments.keywords(index, 1, generator) for index, generator in zip(indices, generators, strict=True)])
        with without_loading_messages():
            images = self.pipe(num_inference_steps=plan.request.steps, generator=generators, **keywords).images
        prompts, labels = keywords.get("prompt"), keywords.get("class_labels")
        return [
            ImageRecord(
                index=index,
                seed=seeds[place],
                engine=plan.engine_digest,
                settings=plan.settings_digest,
                prompt=None if prompts is None else prompts[place],
                label=None if labels is None else int(labels[place]),
                png=png_of(images[place]),
            )
            for place, index in enumerate(indices)
        ]

    def _truncated(self, wanted: ShardRange) -> int:
        """How many images of a shard have a prompt that the text encoder truncates."""
        prompts = self.plan.request.prompts
        if not prompts:
            return 0
        return len(truncated_prompts(self.pipe, [prompts[index % len(prompts)] for index in range(wanted.start, wanted.stop)]))


def joined(keywords: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keyword arguments of a pipeline for several images, from those for each: lists and tensors are joined, `batch_size` is added up."""
    result: dict[str, Any] = {}
    for name, value in keywords[0].items():
        values = [each[name] for each in keywords]
        if name == "batch_size":
            result[name] = sum(values)
        elif isinstance(value, torch.Tensor):
            result[name] = torch.cat(values)
        else:
            result[name] = [entry for each in values for entry in each] if isinstance(value, list) else value
    return result


def png_of(image: Image.Image) -> bytes:
    """An image as PNG."""
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
