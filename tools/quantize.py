"""A model into an artifact on disk: what `calibrate` and `finetune` both do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import calibration
from calibration.recipe import RunOptions
from edm_deploy.artifact import JSON_NAME, Artifact
from edm_deploy.errors import ArtifactError
from edm_deploy.pipelines import load_source
from edm_deploy.target import check_scheme, target_named
from edm_deploy_tools.console import progress


def quantize(model: str, out: Path, recipe: Any, options: RunOptions, *, backend: str | None = None) -> Artifact:
    """Quantize a diffusers model and save the artifact in `out`; everything that can be refused is refused before any training.

    Args:
        model: A local diffusers directory or a hub id.
        out: Where the artifact will stand.
        recipe: A recipe with its settings.
        options: Device, teacher's dtype, checkpoint.
        backend: Check that this backend can carry the scheme.

    Raises:
        ArtifactError, InputError, UnsupportedError: As load_source, calibration.fit and Artifact.save.
    """
    if backend is not None:
        check_scheme(target_named(backend), recipe.weight_bits, recipe.act_bits)
    check_out(out, marker=JSON_NAME)
    if options.resume and options.checkpoint is not None and not options.checkpoint.is_dir():
        raise ArtifactError(f"{options.checkpoint} holds no checkpoint to resume. Start without --resume, or check --out.")
    source = load_source(model)
    with progress() as show:
        artifact = calibration.fit(source, recipe, options, on_progress=show)
    artifact.save(out)
    return artifact


def run_options(*, teacher_dtype: str | None = None, **given: Any) -> RunOptions:
    """RunOptions of what the command line gives; None leaves the teacher's dtype as it is by default."""
    return RunOptions(**given, **({} if teacher_dtype is None else {"teacher_dtype": teacher_dtype}))


def check_out(out: Path, *, marker: str) -> None:
    """Raises ArtifactError where `out` holds something that will not be replaced at the end of the work."""
    if out.exists() and not out.is_dir():
        raise ArtifactError(f"{out} is a file; --out needs a directory. Choose another path.")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).is_file():
        raise ArtifactError(f"{out} exists and holds other files (no {marker}); nothing was done. Choose another path or empty it.")
