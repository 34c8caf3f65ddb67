"""Open an engine directory as a session, as a drop-in denoiser, or as a diffusers pipeline."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from edm_deploy import registry
from edm_deploy.artifact.float_timesteps import FOLDER
from edm_deploy.errors import EdmDeployError
from edm_deploy.runtime.backend import Backend, Session
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.manifest import Manifest


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
    # The only dependency on a higher package: by name, and only when an engine is opened.
    backend: Backend[Any] = registry.load(importlib.import_module("engines"), str(manifest.backend), "BACKEND")
    return manifest, backend.open(Path(path), manifest, torch.device(device or backend.device))


def load_denoiser(path: Path | str, *, device: str | torch.device | None = None) -> EngineDenoiser:
    """Open an engine as a drop-in for the diffusers model that it was made from, for use as `pipe.unet`.

    Raises:
        ArtifactError, UnsupportedError: As `open_session`.
    """
    manifest, session = open_session(path, device=device)
    try:
        relaxed = open_session(Path(path) / FOLDER, device=device)[1] if manifest.relaxed else None
    except EdmDeployError:
        session.close()
        raise
    return EngineDenoiser(manifest, session, relaxed)


def load_pipeline(
    path: Path | str,
    *,
    device: str | torch.device | None = None,
    scheduler: str | None = None,
    source: str | Path | None = None,
) -> Any:  # a DiffusionPipeline
    """Open a diffusers pipeline whose denoiser is the engine: `load_pipeline("engine/")(num_inference_steps=20).images`.

    Args:
        path: Directory that `edm-deploy build-engine` wrote.
        device: Device it runs on; None selects the backend's default.
        scheduler: `ddim`, `ddpm`, `dpm-solver++`, `euler` or `unipc`; None keeps the source pipeline's.
        source: Directory or hub id of the pipeline that the model came from, whose text encoders and VAE are used; None looks in the
            engine's directory, then in the source that the model was quantized from.

    Raises:
        ArtifactError, UnsupportedError: As `open_session`; or the scheduler is unknown, or a component of the pipeline is not found.
    """
    from edm_deploy.pipelines.rebuild import (
        pipeline_from_directory,
    )  # importing diffusers' pipelines is slow, and a denoiser alone needs none

    denoiser = load_denoiser(path, device=device)
    return pipeline_from_directory(Path(path), denoiser.family.component, denoiser, scheduler=scheduler, source=source)
