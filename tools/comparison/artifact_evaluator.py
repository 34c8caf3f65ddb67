"""Evaluate the artifacts of a comparison against the float model: noise error, PSNR, Frechet distance, share of integer work."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.relaxed_timesteps import quantized_graph, relaxed_graph
from edm_deploy.errors import ArtifactError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.layer_costs import model_work, site_work
from edm_deploy.network.meta_model import meta_inputs, meta_model
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.numerics.seeds import LARGEST_SEED
from edm_deploy.pipelines.sampling import Denoise
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.storage.directories import read_json, write_json
from edm_deploy.storage.leftovers import scratch_directory
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
from edm_deploy_tools.common.build_options import build
from edm_deploy_tools.common.console import Notify, bytes_of
from edm_deploy_tools.evaluation.denoisers import denoise_of_artifact, denoise_of_engine
from edm_deploy_tools.evaluation.feature_network import features_of
from edm_deploy_tools.evaluation.frechet import frechet_distance
from edm_deploy_tools.evaluation.trajectory_error import ReferenceTrajectory, reference_trajectory, trajectory_error
from edm_deploy_tools.inspection.work_by_step import shares
from engines import backend_named

ARTIFACT, MEASURED = "artifact", "measured"  # directories in that of an experiment
FIGURES, IMAGES = "figures.json", "images.safetensors"
ENGINE_BATCH = ShapeRange(1, 16, 16)  # samples of one call of an engine
MEASUREMENT = DirectoryKind("a measurement", FIGURES, (IMAGES,))


class ArtifactEvaluator:
    """Evaluates artifacts against trajectories of the float model.

    Args:
        reference: The trajectories.
        backend: Backend whose engines are evaluated, in float32 outside the quantized layers; None is the reference executor.

    Attributes:
        frechet_floor: Frechet distance of two sets of the float model's samples with different noise: the resolution at this number of samples.
    """

    def __init__(self, reference: ReferenceTrajectory, *, backend: str | None = None) -> None:
        self.reference, self.backend = reference, backend
        self.images = self._visible(reference.images)
        self.features = features_of(self.images)
        settings = dataclasses.replace(reference.settings, seeds=tuple(_unused(reference.settings.seeds)))
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
                and cached["engine"] == self.backend
                and "psnr_interval" in cached
                and (directory / MEASURED / IMAGES).is_file()
            ):
                return cached
        except (ArtifactError, KeyError):
            pass
        with self._denoiser(artifact, directory / ARTIFACT) as denoise:
            error = trajectory_error(denoise, self.reference)
        images = self._visible(error.images)
        if not bool(images.isfinite().all()):
            notify("  failed: samples are not finite")
            return {"failed": "The samples are not finite: the quantized model diverges. Use more bits."}
        figures = {
            "setup": settings,
            "artifact": artifact.digest,
            "engine": self.backend,
            "noise_error": error.noise_error,
            "noise_error_by_step": list(error.noise_errors),
            "weighted_error": error.weighted_error,
            "weighted_error_by_step": list(error.weighted_errors),
            "psnr_db": error.psnr,
            "psnr_db_by_seed": list(error.psnrs),
            "psnr_interval": list(error.psnr_interval),
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
        notify(
            f"  PSNR {error.psnr:.1f} dB, weighted error {error.weighted_error:.3g}, noise error {error.noise_error:.4f}, Frechet {figures['frechet']:.3g}"
        )
        return figures

    @contextmanager
    def _denoiser(self, artifact: Artifact, path: Path) -> Iterator[Denoise]:
        """The artifact in the reference executor, or in an engine that exists as long as this context."""
        conditioning = self.reference.conditioning
        if self.backend is None:
            yield denoise_of_artifact(artifact, conditioning)
            return
        with scratch_directory("compare") as scratch:
            content, engine = path, Path(scratch) / "engine"
            if backend_named(self.backend).builds_from == "onnx":
                content = Path(scratch) / "onnx"
                onnx_from_artifact(artifact, content)
            build(content, engine, backend=self.backend, options=BuildOptions(profile={"batch": ENGINE_BATCH}))
            yield denoise_of_engine(engine, conditioning)

    def _visible(self, images: Tensor) -> Tensor:
        return self.reference.decoder.visible(images, self.reference.images).clamp(-1, 1)


def _unused(seeds: Sequence[int]) -> Iterator[int]:
    """As many seeds, none of which is among `seeds`."""
    following = (number % (LARGEST_SEED + 1) for number in itertools.count(seeds[0] + 1))
    return itertools.islice((number for number in following if number not in seeds), len(seeds))


def integer_share(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share, 0 to 1, of the multiply-accumulates of all Conv2d and Linear layers whose weights and inputs are both integer codes.

    The two products of attention are always in floating point and are not counted. At relaxed timesteps with float activations nothing is integer.

    Args:
        artifact: The quantized model.
        timesteps: Timesteps of the sampling steps.
    """
    family, total, integer = artifact.family_object, 0, 0
    model = meta_model(family, artifact.config, artifact.structure)

    def count(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total, integer
            macs = site_work(layer, inputs[0], output).macs
            total += macs
            site = artifact.sites.get(name)
            integer += macs if site is not None and site.activation is not None else 0

        return hook

    for name, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count(name))
    with torch.no_grad():
        family.forward(model, meta_inputs(family, artifact.config))
    quantized_steps = 1.0
    if artifact.relaxed is not None and artifact.relaxed_bits == WEIGHT_ONLY_BITS:
        at = torch.tensor([round(timestep) for timestep in timesteps]).clamp(max=len(artifact.relaxed) - 1)
        quantized_steps = float((artifact.relaxed[at] == 0).double().mean())
    return quantized_steps * integer / total


def int4_share(artifact: Artifact, timesteps: Sequence[float]) -> float:
    """Share, 0 to 1, of the same multiply-accumulates that backend `cuda` computes in INT4, a mean over the sampling steps.

    A layer whose codes do not all fit 4 bits, because of one 5-bit channel or one 8-bit row, is INT8 as a whole.
    """
    work = model_work(artifact.family_object, artifact.config, artifact.structure).sites
    target = capabilities_of("cuda")
    share = shares(quantized_graph(artifact), work, target)["INT4 %"] / 100
    if artifact.relaxed is None:
        return share
    at = torch.tensor([round(timestep) for timestep in timesteps]).clamp(max=len(artifact.relaxed) - 1)
    relaxed = float(artifact.relaxed[at].double().mean())
    return (1 - relaxed) * share + relaxed * shares(relaxed_graph(artifact), work, target)["INT4 %"] / 100


def json_of(value: Any) -> dict[str, Any]:  # a dataclass instance
    """A dataclass as JSON content; what JSON does not have becomes a string."""
    content: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(value), default=str))
    return content
