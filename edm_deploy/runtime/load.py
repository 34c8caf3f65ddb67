"""Open an engine directory as a session, as a drop-in denoiser, or as a diffusers pipeline."""

from __future__ import annotations

import contextlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from edm_deploy import registry
from edm_deploy.adapters.site_weights import FACTORS_NAME, check_factors
from edm_deploy.artifact.relaxed_timesteps import FOLDER
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.models import family_named
from edm_deploy.network.graph_names import OUTPUT
from edm_deploy.runtime.backend import Backend, Session
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import SCHEDULER_FILE, read_pipeline_files
from edm_deploy.storage.tensor_file import load_tensors


def open_session(path: Path | str, *, device: str | torch.device | None = None) -> tuple[Manifest, Session]:
    """Check an engine directory and open it.

    Args:
        path: Directory that `edm-deploy build-engine` wrote.
        device: Device of its inputs; None selects the backend's default.

    Raises:
        ArtifactError: `path` is no engine directory, or its files are not those that were built.
        UnsupportedError: Its backend is not installed, or it was built for another version or device.
    """
    manifest = Manifest.read(path, kind="engine")
    return manifest, _open(Path(path), manifest, device)


def _open(directory: Path, manifest: Manifest, device: str | torch.device | None) -> Session:
    # The only dependency on a higher package: by name, and only when an engine is opened.
    backend: Backend[Any] = registry.load(importlib.import_module("engines"), str(manifest.backend), "BACKEND")
    return backend.open(directory, manifest, torch.device(device or backend.default_device(manifest)))


def with_threads(manifest: Manifest, threads: int | None) -> Manifest:
    """The manifest of an engine that is opened with this number of CPU threads in place of the one that it was built with; None keeps that.

    A backend without the option `threads`, such as those of GPUs, has none to set: its manifest is returned unchanged.

    Raises:
        InputError: Fewer than one thread.
    """
    if threads is None:
        return manifest
    if threads < 1:
        raise InputError(f"{threads} threads: expected 1 or more. Pass another number of threads.")
    options = manifest.build.get("options", {})
    if "threads" not in options:
        return manifest
    return replace(manifest, build={**manifest.build, "options": {**options, "threads": threads}})


def load_denoiser(path: Path | str, *, device: str | torch.device | None = None, threads: int | None = None) -> EngineDenoiser:
    """Open an engine as a drop-in for the diffusers model that it was made from, for use as `pipe.unet` or `pipe.transformer`.

    Args:
        path: Directory that `edm-deploy build-engine` wrote.
        device: Device of its inputs; None selects the backend's default.
        threads: CPU threads of the engine; None keeps the number that it was built with.

    Raises:
        ArtifactError, UnsupportedError: As `open_session`.
        InputError: Fewer than one thread.
    """
    directories = [Path(path)]
    manifests = [with_threads(Manifest.read(path, kind="engine"), threads)]
    if manifests[0].relaxed:
        directories.append(Path(path) / FOLDER)
        manifests.append(with_threads(Manifest.read(directories[1], kind="engine"), threads))
    for directory, manifest in zip(directories, manifests, strict=True):
        _check_denoiser(directory, manifest, like=manifests[0])
    factors = {}
    if manifests[0].adapters is not None and FACTORS_NAME in manifests[0].files:
        factors = load_tensors(directories[0] / FACTORS_NAME)
        check_factors(factors, manifests[0].adapters)
    with contextlib.ExitStack() as stack:  # closes the first session where the second cannot be opened
        sessions = [
            stack.enter_context(_open(directory, manifest, device)) for directory, manifest in zip(directories, manifests, strict=True)
        ]
        stack.pop_all()
    from edm_deploy.pipelines.schedulers import is_flow_config  # here: it imports diffusers, which this package's import must not

    flow = is_flow_config(read_pipeline_files(directories[0]).get(SCHEDULER_FILE, {}))
    return EngineDenoiser(manifests[0], *sessions, flow=flow, lora_factors=factors)


def _check_denoiser(directory: Path, manifest: Manifest, *, like: Manifest) -> None:
    """Raises ArtifactError where an engine's inputs and outputs are not those of the whole denoiser that its config describes."""
    expected = family_named(like.family).inputs(like.config)
    if manifest.adapters != like.adapters:
        raise ArtifactError(f"{directory} has other adapter inputs than the engine that it belongs to. Build the engine again.")
    if manifest.inputs != expected or manifest.outputs != (OUTPUT,) or manifest.dtype != like.dtype:
        names = ", ".join(f"{declared.name} {list(declared.dims)}" for declared in manifest.inputs)
        wanted = ", ".join(f"{declared.name} {list(declared.dims)}" for declared in expected)
        raise ArtifactError(
            f"{directory} has inputs {names} and outputs {', '.join(manifest.outputs)}; expected {wanted} and {OUTPUT} by its config. "
            "Build the engine again."
        )


def load_pipeline(
    path: Path | str,
    *,
    device: str | torch.device | None = None,
    scheduler: str | None = None,
    source: str | Path | None = None,
    threads: int | None = None,
) -> Any:  # a DiffusionPipeline
    """Open a diffusers pipeline whose denoiser is the engine: `load_pipeline("engine/")(num_inference_steps=20).images`.

    Args:
        path: Directory that `edm-deploy build-engine` wrote.
        device: Device it runs on; None selects the backend's default.
        scheduler: `ddim`, `ddpm`, `dpm-solver++`, `euler` or `unipc`; None keeps the source pipeline's.
        source: Directory or hub id of the pipeline that the model came from, whose text encoders and VAE are used; None looks in the
            engine's directory, then in the source that the model was quantized from.
        threads: As `load_denoiser`.

    Raises:
        ArtifactError, UnsupportedError: As `open_session`; or the scheduler is unknown, or a component of the pipeline is not found.
    """
    # Imported here: diffusers' pipelines are slow to import, and a denoiser alone needs none.
    from edm_deploy.pipelines.rebuild import pipeline_from_directory

    denoiser = load_denoiser(path, device=device, threads=threads)
    return pipeline_from_directory(Path(path), denoiser.family.component, denoiser, scheduler=scheduler, source=source)
