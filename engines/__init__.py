"""Backends, one per file: build an engine from an ONNX directory or an artifact, and open it. The entry point is `build_engine`."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from edm_deploy import registry
from edm_deploy.adapters.site_weights import FACTORS_NAME
from edm_deploy.artifact.relaxed_timesteps import FOLDER
from edm_deploy.errors import InputError, flag
from edm_deploy.models import family_named
from edm_deploy.runtime.backend import Backend, BuildOptions, BuildResult
from edm_deploy.runtime.capabilities import SitePlan, execution
from edm_deploy.runtime.manifest import ENGINE, Manifest, ShapeRange
from edm_deploy.storage.directories import PIPELINE_FILES, components_at, copy_components, read_json
from edm_deploy.storage.output_directory import new_directory

DEFAULT_BATCH = ShapeRange(1, 16, 64)


def build_engine(source: Path, out: Path, *, backend: str, options: BuildOptions | None = None, pipeline: Path | None = None) -> Manifest:
    """Build an engine directory atomically: engine, manifest and the pipeline's files. This directory is all that deployment needs.

    Args:
        source: The directory that `edm-deploy export` wrote, or an artifact, as the backend requires.
        out: Directory to write; an engine that is there is replaced.
        backend: `ort`, `openvino`, `trt-rtx`, `trt` from ONNX; `cuda`, `cpu` from the artifact.
        options: Build options; dynamic dimensions without a ShapeRange get a default one.
        pipeline: The source pipeline, whose text encoders, tokenizers and VAE are copied into the engine directory and listed in its manifest;
            None copies none, and the engine's pipeline takes them from the model's source.

    Returns:
        The engine's manifest, as written.

    Raises:
        ArtifactError: `source` is damaged, missing, or not what this backend builds from; or `out` cannot be written.
        UnsupportedError: The backend does not exist, is not installed, does not support an option that is set, or cannot represent the graph.
        InputError: The profile names no dimension of the graph, or sizes that the model cannot take.
    """
    options = options or BuildOptions()
    builder = backend_named(backend)
    builder.refuse_foreign_options(options)
    content, manifest = builder.read(source)
    index = {} if pipeline is None else read_json(source / PIPELINE_FILES[0], what="pipeline")
    component = family_named(manifest.family).component
    if pipeline is not None:
        components_at(pipeline, index, component)  # a missing component is refused before the build, not after
    options = replace(options, profile=complete_profile(manifest, options.profile))
    with new_directory(out, kind=ENGINE) as directory:
        engine = _built(builder, content, manifest, options, directory)
        if manifest.relaxed:
            second = directory / FOLDER
            second.mkdir()
            _built(builder, *builder.relaxed(source, content), options, second).write(second, _files_in(second))
        if pipeline is not None:
            copy_components(index, component, pipeline, directory)
        _copy_pipeline(source, directory)
        if FACTORS_NAME in manifest.files:
            shutil.copyfile(source / FACTORS_NAME, directory / FACTORS_NAME)
        return engine.write(directory, _files_in(directory))


def _built(builder: Backend[Any], content: Any, manifest: Manifest, options: BuildOptions, directory: Path) -> Manifest:
    """Build into an empty directory and return the engine's manifest, not yet written."""
    started = time.perf_counter()
    built = builder.build(content, manifest, options, directory)
    seconds = time.perf_counter() - started
    size = sum((directory / name).stat().st_size for name in _files_in(directory))
    return replace(
        manifest,
        kind="engine",
        backend=builder.name,
        profile=options.profile,
        plan=executed_plan(manifest, builder, built),
        build=_description(built, seconds, size),
        adapters=built.adapters or manifest.adapters,
    )


def backend_named(name: str) -> Backend[Any]:
    """The backend in `engines/<name>.py`; UnsupportedError lists the known ones otherwise."""
    backend: Backend[Any] = registry.load(sys.modules[__name__], name, "BACKEND")
    return backend


def complete_profile(manifest: Manifest, requested: Mapping[str, ShapeRange]) -> dict[str, ShapeRange]:
    """A ShapeRange for every dynamic dimension: the requested one, else 1:16:64 for the batch and the size in the model's config for the others.

    Raises:
        InputError: A name is no dynamic dimension of the graph, a size cannot be halved by the model's levels, or it exceeds the model's maximum.
    """
    dims = manifest.dynamic_dims
    if unknown := sorted(set(requested) - set(dims)):
        raise InputError(f"{flag(unknown[0])}: the graph has no dynamic dimension of this name. It has {', '.join(dims)}.")
    family = family_named(manifest.family)
    defaults = {dim: ShapeRange(size, size, size) for dim, size in family.sizes(manifest.config).items()} | {"batch": DEFAULT_BATCH}
    profile = {dim: requested.get(dim) or defaults[dim] for dim in dims}
    multiple = family.size_multiple(manifest.config)
    for dim in {"height", "width"} & set(profile):
        sizes = profile[dim]
        if any(size % multiple for size in (sizes.min, sizes.opt, sizes.max)):
            raise InputError(f"--{dim} {sizes.min}:{sizes.opt}:{sizes.max}: this model's levels need multiples of {multiple}.")
    for dim, largest in family.limits(manifest.config).items():
        if dim in profile and profile[dim].max > largest:
            raise InputError(f"--{dim} {profile[dim].min}:{profile[dim].opt}:{profile[dim].max}: this model has positions up to {largest}.")
    return profile


def executed_plan(manifest: Manifest, builder: Backend[Any], built: BuildResult) -> dict[str, SitePlan]:
    """How each site is executed: as the build observed, else as the backend's capabilities state."""
    return {
        name: SitePlan(
            site.scheme,
            built.executed.get(name) or execution(site.op, site.quantized_input, builder.target),
            built.codes.get(name),
        )
        for name, site in manifest.sites.items()
    }


def _description(built: BuildResult, seconds: float, size: int) -> dict[str, object]:
    return {
        "versions": dict(built.versions),
        "options": dict(built.options),
        "warnings": list(built.warnings),
        "seconds": round(seconds, 2),
        "engine_bytes": size,
        **built.details,
    }


def _files_in(directory: Path) -> list[str]:
    return [path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()]


def _copy_pipeline(source: Path, directory: Path) -> None:
    for name in PIPELINE_FILES:
        if (source / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, directory / name)
