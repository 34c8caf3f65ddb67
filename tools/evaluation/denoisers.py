"""The float model, artifacts and engines as denoisers of an evaluation, with their conditioning bound."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import reference_with_correction
from edm_deploy.network.family import SAMPLE
from edm_deploy.pipelines.guidance import Conditioning
from edm_deploy.pipelines.sampling import Denoise
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy_tools.images.sample import batch_sizes

FORWARD_BATCH = 64  # samples of one forward pass in torch: its activations are in memory at once


def denoise_of_source(source: Source, conditioning: Conditioning) -> Denoise:
    """The float model, with conditioning and guidance."""

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return source.family_object.prediction(source.config, source.family_object.forward(source.model, inputs))

    return conditioning.denoiser(run, FORWARD_BATCH)


def denoise_of_artifact(artifact: Artifact, conditioning: Conditioning) -> Denoise:
    """An artifact in the reference executor, with the runtime's timestep correction, conditioning and guidance."""
    reference = reference_with_correction(artifact)

    def run(inputs: Mapping[str, Tensor]) -> Tensor:
        return artifact.family_object.prediction(artifact.config, reference(inputs))

    return conditioning.denoiser(run, FORWARD_BATCH)


def denoise_of_engine(
    path: Path, conditioning: Conditioning, *, device: str | None = None, loras: Sequence[tuple[Path, float]] = ()
) -> Denoise:
    """An engine on `device`, or on the default device of its backend; a batch outside its profile is split into batches inside it.

    Args:
        path: Directory of the engine.
        conditioning: Conditioning and guidance of the samples.
        device: Where it runs.
        loras: Files of LoRAs with their weights, loaded into the engine's rank slots.

    Raises:
        InputError: The engine does not take a LoRA.
    """
    denoiser = load_denoiser(path, device=device)
    for file, weight in loras:
        denoiser.load_lora(file, weight=weight)
    allowed = denoiser.manifest.profile.get("batch", ShapeRange(1, 1, 1 << 30))

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        inputs = conditioning.of_members(torch.arange(len(sample))).inputs(sample, timestep)
        count, pieces, start = len(inputs[SAMPLE]), [], 0
        for size in batch_sizes(count, allowed):
            pieces.append(_run(denoiser, {name: _rows(value, start, size) for name, value in inputs.items()}))
            start += size
        return conditioning.combine(denoiser.family.prediction(denoiser.manifest.config, torch.cat(pieces)[:count]))

    return denoise


def timed(denoise: Denoise, times: list[float]) -> Denoise:
    """`denoise`, with the wall time of each call in seconds appended to `times`."""

    def timing(sample: Tensor, timestep: Tensor) -> Tensor:
        start = time.perf_counter()
        prediction = denoise(sample, timestep)
        times.append(time.perf_counter() - start)
        return prediction

    return timing


def _run(denoiser: EngineDenoiser, inputs: Mapping[str, Tensor]) -> Tensor:
    return denoiser.run({name: value.to(denoiser.device) for name, value in inputs.items()}).float().cpu()


def _rows(value: Tensor, start: int, size: int) -> Tensor:
    """`size` rows of `value` from `start` on, padded with copies of the last row."""
    return value[torch.arange(start, start + size).clamp(max=len(value) - 1)]
