"""Shape profiles as users write them, and the build that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engines
from edm_deploy.errors import ArtifactError, InputError, flag
from edm_deploy.pipelines.model_index import INDEX
from edm_deploy.pipelines.source import local_directory
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.storage.directories import SOURCE_KEY, read_json


def build_options(sizes: Mapping[str, str | None], asked: Mapping[str, Any]) -> BuildOptions:
    """Options of a build.

    Args:
        sizes: `MIN:OPT:MAX` by dimension; None is not given.
        asked: The other fields of BuildOptions.

    Raises:
        InputError: A profile is not MIN:OPT:MAX, or a number is outside its range.
    """
    profile = {dim: range_of(dim, text) for dim, text in sizes.items() if text is not None}
    level, threads, workspace = asked.get("optimization_level"), asked.get("threads"), asked.get("workspace_mib")
    if level is not None and not 0 <= level <= 5:
        raise InputError(f"--optimization-level {level}: expected 0 to 5.")
    for name, value in (("threads", threads), ("workspace_mib", workspace)):
        if value is not None and value < 1:
            raise InputError(f"{flag(name)} {value}: expected 1 or more.")
    return BuildOptions(profile=profile, **asked)


def range_of(dim: str, text: str) -> ShapeRange:
    """`1:16:32` as a Range; one number stands for all three. InputError where it is neither."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"{flag(dim)} {text}: expected MIN:OPT:MAX, for example 1:16:32, or one number.")
    numbers = [int(part) for part in parts]
    return ShapeRange(*numbers) if len(numbers) == 3 else ShapeRange(numbers[0], numbers[0], numbers[0])


def build(source: Path, out: Path, *, backend: str, options: BuildOptions, pipeline: Path | None = None) -> Manifest:
    """`engines.build_engine`."""
    return engines.build_engine(source, out, backend=backend, options=options, pipeline=pipeline)


def pipeline_home(source: Path, asked: bool, components: str | None) -> Path | None:
    """The directory of the pipeline whose other components are copied beside an engine; None where that is not asked for.

    Args:
        source: What the engine is built from; its model_index.json says which pipeline it belongs to, and where that was.
        asked: Whether they are copied at all.
        components: Directory or hub id to copy from; None takes the one that `source` names.

    Raises:
        InputError: A place to copy from, and no wish to.
        ArtifactError: No pipeline there, or one of another kind.
    """
    if not asked:
        if components is not None:
            raise InputError("--source names where --with-pipeline copies from. Add --with-pipeline, or leave it out.")
        return None
    index = read_json(source / INDEX, what="pipeline")
    named = components or index.get(SOURCE_KEY)
    if not named:
        raise ArtifactError(f"{source} does not say which pipeline it was made from. Name it with --source MODEL.")
    try:
        home = local_directory(named)
    except ArtifactError as err:
        raise ArtifactError(f"--with-pipeline: {err} Name the pipeline with --source MODEL.") from err
    found = read_json(home / INDEX, what="diffusers pipeline").get("_class_name")
    if found != index.get("_class_name"):
        raise ArtifactError(f"{home} is a {found}, {source} belongs to a {index.get('_class_name')}. Name one of that kind with --source.")
    return home
