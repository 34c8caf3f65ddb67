"""A model into an artifact on disk: what `calibrate` and `finetune` both do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import calibration
from calibration.recipe import RunOptions
from edm_deploy.artifact import JSON_NAME, Artifact
from edm_deploy.errors import ArtifactError
from edm_deploy.files import check_replaceable
from edm_deploy.pipelines import load_source
from edm_deploy.target import check_scheme, target_named
from edm_deploy_tools.console import progress


def quantize(model: str, out: Path, recipe: Any, options: RunOptions, *, backend: str | None = None) -> Artifact:
    """Quantize a diffusers model and save the artifact in `out`; everything that can be refused is refused before any training.

    Args:
        model: A local diffusers directory or a hub id.
        out: Where the artifact will stand.
        recipe: A recipe with its settings.
        options: Device, teacher's dtype, checkpoint; the checkpoint is removed once the artifact stands.
        backend: Check that this backend can carry the scheme.

    Raises:
        ArtifactError, InputError, UnsupportedError: As load_source, calibration.fit and Artifact.save.
    """
    if backend is not None:
        check_scheme(target_named(backend), recipe.weight_bits, recipe.act_bits)
    check_replaceable(out, marker=JSON_NAME)
    if options.resume and options.checkpoint is not None and not options.checkpoint.is_dir():
        raise ArtifactError(f"{options.checkpoint} holds no checkpoint to resume. Start without --resume, or check --out.")
    source = load_source(model)
    with progress() as show:
        artifact = calibration.fit(source, recipe, options, on_progress=show)
    artifact.save(out)
    if options.checkpoint is not None:
        shutil.rmtree(options.checkpoint, ignore_errors=True)
    return artifact


def run_options(*, teacher_dtype: str | None = None, **given: Any) -> RunOptions:
    """RunOptions of what the command line gives; None leaves the teacher's dtype as it is by default."""
    return RunOptions(**given, **({} if teacher_dtype is None else {"teacher_dtype": teacher_dtype}))
