"""Shape profiles as users write them, and the build that takes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import engines
from edm_deploy.errors import InputError
from edm_deploy.manifest import Manifest, Range
from edm_deploy.session import BuildOptions


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
    for flag, value in (("--threads", threads), ("--workspace-mib", workspace)):
        if value is not None and value < 1:
            raise InputError(f"{flag} {value}: expected 1 or more.")
    return BuildOptions(profile=profile, **asked)


def range_of(dim: str, text: str) -> Range:
    """`1:16:32` as a Range; one number stands for all three. InputError where it is neither."""
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.strip().isdigit() for part in parts):
        raise InputError(f"--{dim} {text}: expected MIN:OPT:MAX, for example 1:16:32, or one number.")
    numbers = [int(part) for part in parts]
    return Range(*numbers) if len(numbers) == 3 else Range(numbers[0], numbers[0], numbers[0])


def build(source: Path, out: Path, *, backend: str, options: BuildOptions) -> Manifest:
    """`engines.build_engine`."""
    return engines.build_engine(source, out, backend=backend, options=options)
