"""Options of `build-engine`: shape profiles, builder options, and the pipeline whose components are copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engines
from edm_deploy.errors import ArtifactError, InputError, flag
from edm_deploy.pipelines.source import local_directory
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import MAX_SIZE, Manifest, ShapeRange
from edm_deploy.storage.directories import INDEX_FILE, SOURCE_KEY, read_json


def build_options(sizes: Mapping[str, str | None], others: Mapping[str, Any]) -> BuildOptions:
    """BuildOptions from the command line.

    Args:
        sizes: `MIN:OPT:MAX` by dimension; a value of None is ignored.
        others: The other fields of BuildOptions.

    Raises:
        InputError: A profile is not MIN:OPT:MAX, or a number is out of range.
    """
    profile = {dim: range_of(dim, text) for dim, text in sizes.items() if text is not None}
    level, threads, workspace = others.get("optimization_level"), others.get("threads"), others.get("workspace_mib")
    if level is not None and not 0 <= level <= 5:
        raise InputError(f"--optimization-level {level}: expected 0 to 5.")
    for name, value in (("threads", threads), ("workspace_mib", workspace)):
        if value is not None and value < 1:
            raise InputError(f"{flag(name)} {value}: expected 1 or more.")
    return BuildOptions(profile=profile, **others)


def range_of(dim: str, text: str) -> ShapeRange:
    """The ShapeRange of `1:16:32`, or of one number for all three; InputError for anything else."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"{flag(dim)} {text}: expected MIN:OPT:MAX, for example 1:16:32, or one number.")
    smallest, best, largest = (int(part) for part in (parts if len(parts) == 3 else parts * 3))
    if not 1 <= smallest <= best <= largest <= MAX_SIZE:
        raise InputError(f"{flag(dim)} {text}: expected 1 <= MIN <= OPT <= MAX <= {MAX_SIZE}, for example 1:16:32.")
    return ShapeRange(smallest, best, largest)


def build(source: Path, out: Path, *, backend: str, options: BuildOptions, pipeline: Path | None = None) -> Manifest:
    """Build an engine; see `engines.build_engine`."""
    return engines.build_engine(source, out, backend=backend, options=options, pipeline=pipeline)


def pipeline_to_copy(source: Path, requested: bool, components: str | None) -> Path | None:
    """The directory of the pipeline whose other components are copied into an engine's directory; None if not requested.

    Args:
        source: Directory that the engine is built from; its model_index.json records the pipeline's class and location.
        requested: Whether components are copied.
        components: Directory or hub id to copy from; None is the location that `source` records.

    Raises:
        InputError: `components` without `requested`.
        ArtifactError: There is no pipeline at that location, or one of another class.
    """
    if not requested:
        if components is not None:
            raise InputError("--source names the pipeline that --with-pipeline copies from. Add --with-pipeline, or leave --source out.")
        return None
    index = read_json(source / INDEX_FILE, what="pipeline")
    location = components or index.get(SOURCE_KEY)
    if not location:
        raise ArtifactError(f"{source} does not record the pipeline that it was made from. Name it with --source MODEL.")
    try:
        home = local_directory(location)
    except ArtifactError as err:
        raise ArtifactError(f"--with-pipeline: {err} Name the pipeline with --source MODEL.") from err
    actual = read_json(home / INDEX_FILE, what="diffusers pipeline").get("_class_name")
    if actual != index.get("_class_name"):
        raise ArtifactError(
            f"{home} is a {actual}, {source} belongs to a {index.get('_class_name')}. Name a pipeline of that class with --source."
        )
    return home
