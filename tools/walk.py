"""The float model's walk from noise to images, and another denoiser beside it: how far it is, step by step and at the end."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from edm_deploy.artifact import Artifact
from edm_deploy.conditioning import Conditioner, Conditioning
from edm_deploy.denoiser import EngineDenoiser, load_denoiser
from edm_deploy.errors import InputError
from edm_deploy.manifest import Range
from edm_deploy.pipelines import Source, scheduler_named, schedulers_for
from edm_deploy.reference import Reference
from edm_deploy.sampling import Denoise, Step, last_sample, trajectory
from edm_deploy_tools.sample import batch_sizes

DETERMINISTIC = ("ddim", "flow-euler")  # the same noise always ends in the same image
SMALLEST_MSE = 1e-12  # keeps the PSNR of identical images finite: 126 dB


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is measured on.

    Attributes:
        samples: Trajectories, all in one batch.
        steps: Inference steps of DDIM without fresh noise; of Euler where the model was trained by flow matching.
        seed: Of the first noise and of the conditioning.
    """

    samples: int = 16
    steps: int = 20
    seed: int = 123

    def __post_init__(self) -> None:
        for name in ("samples", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: expected 1 or more.")


@dataclass(frozen=True, kw_only=True)
class FloatWalk:
    """The float model's own trajectories.

    Attributes:
        source: The float model.
        setup: What it was walked with.
        noise: float32 [B, C, H, W].
        conditioning: Graph inputs beyond sample and timestep, by name.
        steps: In walking order.
        final: The samples at the end, [B, C, H, W].
        seconds: Median wall time of one forward pass of the batch.
    """

    source: Source
    setup: Setup
    noise: Tensor
    conditioning: Mapping[str, Tensor]
    steps: tuple[Step, ...]
    final: Tensor
    seconds: float

    @property
    def timesteps(self) -> list[float]:
        """Timestep of each step."""
        return [step.timestep for step in self.steps]


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a denoiser is from the float model.

    Attributes:
        noise_errors: For each step of the float model's walk, ||e_q - e_f||^2 / ||e_f||^2 over the batch.
        psnr: Of the final images, each model on its own walk from the same noise, in dB; samples clamped to [-1, 1].
        final: This denoiser's own final samples.
        seconds: Median wall time of one forward pass of the batch.
    """

    noise_errors: tuple[float, ...]
    psnr: float
    final: Tensor
    seconds: float

    @property
    def noise_error(self) -> float:
        """Mean over the steps."""
        return fmean(self.noise_errors)


def walk(source: Source, setup: Setup) -> FloatWalk:
    """Walk the float model."""
    generator = torch.Generator().manual_seed(setup.seed)
    noise = torch.randn(setup.samples, *source.family_object.walked_shape(source.config), generator=generator)
    conditioning = Conditioner(source.family_object, source.config).draw(setup.samples, generator)
    times: list[float] = []
    denoise = timed(denoise_of_source(source, conditioning), times)
    steps = tuple(trajectory(denoise, _scheduler(source), noise, steps=setup.steps))
    return FloatWalk(
        source=source, setup=setup, noise=noise, conditioning=conditioning, steps=steps, final=steps[-1].next_sample, seconds=median(times)
    )


def distance(denoise: Denoise, reference: FloatWalk) -> Distance:
    """Measure a denoiser beside the float model's walk and on its own."""
    times: list[float] = []
    denoise = timed(denoise, times)
    errors = [
        relative_error(denoise(step.sample, torch.full((len(step.sample),), step.timestep)), step.prediction) for step in reference.steps
    ]
    final = last_sample(trajectory(denoise, _scheduler(reference.source), reference.noise, steps=reference.setup.steps))
    return Distance(noise_errors=tuple(errors), psnr=psnr(final, reference.final), final=final, seconds=median(times))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected||^2 / ||expected||^2 over all elements."""
    return float((found.double() - expected.double()).pow(2).sum() / expected.double().pow(2).sum())


def psnr(found: Tensor, expected: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of samples clamped to [-1, 1], whose range is 2: -10 log10(mse / 4)."""
    mse = float((found.clamp(-1, 1).double() - expected.clamp(-1, 1).double()).pow(2).mean())
    return -10 * math.log10(max(mse, SMALLEST_MSE) / 4)


def denoise_of_source(source: Source, conditioning: Mapping[str, Tensor]) -> Denoise:
    """The float model."""

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        inputs = Conditioning(conditioning).inputs(sample, timestep)
        return source.family_object.prediction(source.config, source.family_object.forward(source.model, inputs))

    return denoise


def denoise_of_artifact(artifact: Artifact, conditioning: Mapping[str, Tensor]) -> Denoise:
    """An artifact, computed by the reference executor."""
    reference = Reference(artifact)

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        return artifact.family_object.prediction(artifact.config, reference(Conditioning(conditioning).inputs(sample, timestep)))

    return denoise


def denoise_of_engine(path: Path, conditioning: Mapping[str, Tensor], *, device: str | None = None) -> Denoise:
    """An engine on `device`, or where its backend runs; a batch that its profile does not take is cut into ones that it does."""
    denoiser = load_denoiser(path, device=device)
    allowed = denoiser.manifest.profile.get("batch", Range(1, 1, 1 << 30))

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        inputs = Conditioning(conditioning).inputs(sample, timestep)
        pieces, start = [], 0
        for size in batch_sizes(len(sample), allowed):
            pieces.append(_run(denoiser, {name: _rows(value, start, size) for name, value in inputs.items()}))
            start += size
        return denoiser.family.prediction(denoiser.manifest.config, torch.cat(pieces)[: len(sample)])

    return denoise


def _scheduler(source: Source) -> Any:  # diffusers' schedulers share no useful base class
    """DDIM without fresh noise for a diffusion, Euler for a flow."""
    (name,) = set(DETERMINISTIC) & set(schedulers_for(source.scheduler.config))
    return scheduler_named(name, source.scheduler.config)


def timed(denoise: Denoise, times: list[float]) -> Denoise:
    """`denoise`, each call's wall time in seconds added to `times`."""

    def timing(sample: Tensor, timestep: Tensor) -> Tensor:
        start = time.perf_counter()
        prediction = denoise(sample, timestep)
        times.append(time.perf_counter() - start)
        return prediction

    return timing


def _run(denoiser: EngineDenoiser, inputs: Mapping[str, Tensor]) -> Tensor:
    return denoiser.run({name: value.to(denoiser.device) for name, value in inputs.items()}).float().cpu()


def _rows(value: Tensor, start: int, size: int) -> Tensor:
    """`size` rows of `value` from `start` on; the last row stands in for the ones that are not there."""
    return value[torch.arange(start, start + size).clamp(max=len(value) - 1)]
