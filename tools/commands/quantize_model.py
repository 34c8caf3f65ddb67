"""A model into an artifact on disk: what `calibrate` and `finetune` both do."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

import calibration
from calibration.base_pass import Pass, check_passes
from calibration.run.memory import needed_memory
from calibration.run.options import RunOptions
from edm_deploy.artifact.artifact import JSON_NAME, Artifact
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.family import meta_model
from edm_deploy.pipelines.model_index import read_pipeline_config
from edm_deploy.pipelines.source import load_source, local_directory
from edm_deploy.runtime.capabilities import capabilities_of, check_scheme
from edm_deploy.storage.directories import check_replaceable
from edm_deploy_tools.common.console import progress


def quantize(
    model: str,
    out: Path,
    recipe: Any,
    options: RunOptions,
    *,
    passes: Sequence[Pass] = (),
    backend: str | None = None,
    low_memory: bool = False,
    force: bool = False,
) -> Artifact:
    """Quantize a diffusers model and save the artifact in `out`; everything that can be refused is refused before any training.

    Args:
        model: A local diffusers directory or a hub id.
        out: Where the artifact will stand.
        recipe: A recipe with its settings.
        options: Device, teacher's dtype, checkpoint; the checkpoint is removed once the artifact stands.
        passes: What the recipe is composed with, in this order.
        backend: Check that this backend can carry the scheme.
        low_memory: Leave the float weights in their files until a layer runs.
        force: Begin even where memory is expected to run out.

    Raises:
        ArtifactError, InputError, UnsupportedError: As load_source, calibration.fit and Artifact.save.
    """
    check_passes(passes, recipe)
    if backend is not None:
        check_scheme(capabilities_of(backend), recipe.weight_bits, recipe.act_bits)
    check_replaceable(out, marker=JSON_NAME)
    if options.resume and options.checkpoint is not None and not options.checkpoint.is_dir():
        raise ArtifactError(f"{options.checkpoint} holds no checkpoint to resume. Start without --resume, or check --out.")
    if not force:
        _check_memory(model, learns=recipe.trains, low_memory=low_memory, cached=recipe.cached_bytes)
    source = load_source(model, low_memory=low_memory)
    with progress() as show:
        artifact = calibration.fit(source, recipe, options, passes=passes, on_progress=show)
    artifact.save(out)
    if options.checkpoint is not None:
        shutil.rmtree(options.checkpoint, ignore_errors=True)
    return artifact


def _check_memory(model: str, *, learns: bool, low_memory: bool, cached: int) -> None:
    outline = read_pipeline_config(local_directory(model), model)
    parameters = sum(value.numel() for value in meta_model(outline.family_object, outline.config).parameters())
    needed = needed_memory(parameters, trains=learns, low_memory=low_memory, cached=cached)
    free = psutil.virtual_memory().available
    if needed > free:
        mend = (
            "Free some, or begin nevertheless with --force"
            if low_memory
            else "Use --low-memory, free some, or begin nevertheless with --force"
        )
        raise InputError(f"{model} needs about {needed / 1e9:.1f} GB of memory to be quantized so, {free / 1e9:.1f} GB are free. {mend}.")


def run_options(*, teacher_dtype: str | None = None, **given: Any) -> RunOptions:
    """RunOptions of what the command line gives; None leaves the teacher's dtype as it is by default."""
    return RunOptions(**given, **({} if teacher_dtype is None else {"teacher_dtype": teacher_dtype}))
