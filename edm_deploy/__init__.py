"""edm-deploy: low-bit diffusion models that run on integer kernels. This package defines quantized denoisers; `calibration` makes them, `engines` runs them."""

from __future__ import annotations

from importlib.metadata import version

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, EdmDeployError, InputError, UnsupportedError
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser, load_pipeline
from edm_deploy.runtime.manifest import Manifest

__version__ = version("edm-deploy")

__all__ = [
    "Artifact",
    "ArtifactError",
    "EdmDeployError",
    "EngineDenoiser",
    "InputError",
    "Manifest",
    "UnsupportedError",
    "load_denoiser",
    "load_pipeline",
]
