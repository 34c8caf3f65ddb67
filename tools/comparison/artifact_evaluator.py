"""Evaluate the artifacts of a comparison against the float model: noise error, PSNR, Frechet distance, share of integer work."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError
from edm_deploy.numerics.seeds import LARGEST_SEED
from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy.storage.directories import read_json, write_json
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
from edm_deploy_tools.common.console import Notify, bytes_of
from edm_deploy_tools.evaluation.feature_network import features_of
from edm_deploy_tools.evaluation.frechet import frechet_distance
from edm_deploy_tools.evaluation.trajectory_error import ReferenceTrajectory, denoise_of_artifact, reference_trajectory, trajectory_error
from edm_deploy_tools.inspection.executed_work import layer_macs, work_shares

ARTIFACT, MEASURED = "artifact", "measured"  # directories in that of an experiment
FIGURES, IMAGES = "figures.json", "images.safetensors"
MEASUREMENT = DirectoryKind("a measurement", FIGURES, (IMAGES,))


class ArtifactEvaluator:
    """Evaluates artifacts against trajectories of the float model.

    Args:
        reference: The trajectories.

    Attributes:
        frechet_floor: Frechet distance of two sets of the float model's samples with different noise: the resolution at this number of samples.
    """

    def __init__(self, reference: ReferenceTrajectory) -> None:
        self.reference = reference
        self.images = self._visible(reference.images)
        self.features = features_of(self.images)
        settings = dataclasses.replace(reference.settings, seed=(reference.settings.seed + 1) % (LARGEST_SEED + 1))
        other = reference_trajectory(reference.source, settings)
        self.frechet_floor = frechet_distance(features_of(self._visible(other.images)), self.features)

    def figures(self, directory: Path, notify: Notify) -> dict[str, Any]:
        """Figures of the artifact of an experiment, measured once for each settings; `failed` with the reason if its samples are not finite."""
        settings = json_of(self.reference.settings)
        artifact = Artifact.load(directory / ARTIFACT)
        try:
            cached = read_json(directory / MEASURED / FIGURES, what="measured")
            if (
                cached["setup"] == settings
                and cached["artifact"] == artifact.digest
                and "int4_share" in cached
                and (directory / MEASURED / IMAGES).is_file()
            ):
                return cached
        except (ArtifactError, KeyError):
            pass
        error = trajectory_error(denoise_of_artifact(artifact, self.reference.conditioning), self.reference)
        images = self._visible(error.images)
        if not bool(images.isfinite().all()):
            notify("  failed: samples are not finite")
            return {"failed": "The samples are not finite: the quantized model diverges. Use more bits."}
        figures = {
            "setup": settings,
            "artifact": artifact.digest,
            "noise_error": error.noise_error,
            "noise_error_by_step": list(error.noise_errors),
            "psnr_db": error.psnr,
            "frechet": frechet_distance(features_of(images), self.features),
            "bytes": bytes_of(directory / ARTIFACT),
            "integer_share": integer_share(artifact, self.reference.timesteps),
            "int4_share": int4_share(artifact, self.reference.timesteps),
            "steps_done": artifact.provenance.get("steps_done"),
            "quantizing_seconds": artifact.provenance.get("wall_seconds"),
        }
        with new_directory(directory / MEASURED, kind=MEASUREMENT) as temporary:
            save_file({"images": images.half().contiguous()}, temporary / IMAGES)
            write_json(temporary / FIGURES, figures)
        notify(f"  noise error {error.noise_error:.4f}, PSNR {error.psnr:.1f} dB, Frechet {figures['frechet']:.3g}")
        return figures

    def _visible(self, images: Tensor) -> Tensor:
        return self.reference.decoder.visible(images, self.reference.images).clamp(-1, 1)


def integer_share(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share, 0 to 1, of the multiply-accumulates of all Conv2d and Linear layers whose weights and inputs are both integer codes.

    The two products of attention are always in floating point and are not counted. At timesteps with float activations nothing is integer.

    Args:
        artifact: The quantized model.
        timesteps: Timesteps of the sampling steps.
    """
    macs = layer_macs(artifact)
    integer = sum(macs[name] for name, site in artifact.sites.items() if site.activation is not None)
    total = sum(macs.values())
    return _quantized_steps(artifact, timesteps) * integer / total


def int4_share(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share, 0 to 1, of the same multiply-accumulates whose weights and inputs both fit 4 bits, so that backend `cuda` computes them in INT4."""
    shares = work_shares(artifact, capabilities_of("cuda"))
    return _quantized_steps(artifact, timesteps) * shares.get("int4", 0.0)


def _quantized_steps(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share of the sampling steps whose activations are quantized by the tables."""
    if artifact.relaxed is None:
        return 1.0
    at = torch.tensor([round(timestep) for timestep in timesteps]).clamp(max=len(artifact.relaxed) - 1)
    return float((artifact.relaxed[at] == 0).double().mean())


def json_of(value: Any) -> dict[str, Any]:  # a dataclass instance
    """A dataclass as JSON content; what JSON does not have becomes a string."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value), default=str))
    return content
