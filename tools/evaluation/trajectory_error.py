"""Sampling trajectories of the float model, and the error of another denoiser along them: per step, and of the final images."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import reference_with_correction
from edm_deploy.errors import InputError
from edm_deploy.network.family import SAMPLE
from edm_deploy.network.graph_names import SCALE_INPUT
from edm_deploy.numerics.seeds import check_seed
from edm_deploy.pipelines.guidance import Conditioning
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts, conditioner_of, takes_prompts
from edm_deploy.pipelines.prompt_file import read_prompts
from edm_deploy.pipelines.sampling import Denoise, Step, last_sample, trajectory
from edm_deploy.pipelines.schedulers import scheduler_named, schedulers_for
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy_tools.common.assets import ASSETS
from edm_deploy_tools.images.decoding import Decoder, decoder_of
from edm_deploy_tools.images.sample import batch_sizes

DETERMINISTIC = ("ddim", "flow-euler")  # schedulers without randomness: the same noise always gives the same image
PROMPTS = ASSETS / "prompts" / "evaluation.txt"  # disjoint from the prompts that models are calibrated with


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The samples that models are evaluated on.

    Attributes:
        samples: Number of trajectories, all in one batch.
        steps: Inference steps: DDIM with eta 0, or Euler for a flow-matching model.
        seed: Of the initial noise and of the conditioning.
        guidance: Scale of classifier-free or embedded guidance; None is the usual scale of the model.
        prompts: For a text-conditional model, assigned to samples cyclically; if empty, those of assets/prompts/evaluation.txt.
    """

    samples: int = 16
    steps: int = 20
    seed: int = 123
    guidance: float | None = None
    prompts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("samples", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: expected 1 or more.")
        check_seed(self.seed)


@dataclass(frozen=True, kw_only=True)
class ReferenceTrajectory:
    """Sampling trajectories of the float model.

    Attributes:
        source: The float model.
        settings: Samples, steps, seed, guidance, prompts.
        noise: Initial noise, float32 [B, ...]: [B, C, H, W] except for packed latents.
        conditioning: Conditioning and guidance of the samples.
        origin: Description of where the conditioning comes from.
        decoder: Converts samples to images.
        steps: In sampling order; predictions include guidance.
        final: Final samples, [B, ...].
        images: Decoded final samples, [B, C, H, W].
        seconds: Median wall time of one forward pass of the batch.
    """

    source: Source
    settings: EvaluationSettings
    noise: Tensor
    conditioning: Conditioning
    origin: str
    decoder: Decoder
    steps: tuple[Step, ...]
    final: Tensor
    images: Tensor
    seconds: float

    @property
    def scheduler(self) -> str:
        """Name of the scheduler."""
        return deterministic(self.source)

    @property
    def guidance(self) -> float | None:
        """Guidance scale; None if the model is not guided."""
        conditional = self.conditioning.conditional
        if SCALE_INPUT in conditional:
            return float(conditional[SCALE_INPUT][0])
        return self.conditioning.scale if self.conditioning.unconditional else None

    @property
    def timesteps(self) -> list[float]:
        """Timestep of each step."""
        return [step.timestep for step in self.steps]


@dataclass(frozen=True, kw_only=True)
class TrajectoryError:
    """Error of a denoiser with respect to the float model.

    Attributes:
        noise_errors: ||e_q - e_f||^2 / ||e_f||^2 over the batch, for each step of the float model's trajectory.
        psnr: PSNR of the final images in dB, each model on its own trajectory from the same noise; `Decoder.words` describes the images.
        final: Final samples of this denoiser.
        images: Decoded final samples, [B, C, H, W].
        seconds: Median wall time of one forward pass of the batch.
    """

    noise_errors: tuple[float, ...]
    psnr: float
    final: Tensor
    images: Tensor
    seconds: float

    @property
    def noise_error(self) -> float:
        """Mean over the steps."""
        return fmean(self.noise_errors)


def reference_trajectory(source: Source, settings: EvaluationSettings) -> ReferenceTrajectory:
    """Sample the trajectories of the float model.

    Raises:
        InputError: Prompts or a guidance scale for a model that takes none.
        ArtifactError: A text encoder or the VAE cannot be read.
    """
    if settings.prompts:
        check_takes_prompts(source)
    prompts = (settings.prompts or read_prompts(PROMPTS))[: settings.samples]
    conditioner = conditioner_of(source, scale=settings.guidance, prompts=prompts)
    generator = torch.Generator().manual_seed(settings.seed)
    noise = torch.randn(settings.samples, *source.family_object.latent_shape(source.config), generator=generator)
    conditioning = conditioner.of(conditioner.draw(settings.samples, generator, in_turn=takes_prompts(source)))
    times: list[float] = []
    denoise = timed(denoise_of_source(source, conditioning), times)
    sigmas = source.family_object.sigmas(settings.steps)
    steps = tuple(trajectory(denoise, _scheduler(source), noise, steps=settings.steps, sigmas=sigmas))
    decoder, final = decoder_of(source), steps[-1].next_sample
    return ReferenceTrajectory(
        source=source,
        settings=settings,
        noise=noise,
        conditioning=conditioning,
        origin=conditioner.origin,
        decoder=decoder,
        steps=steps,
        final=final,
        images=decoder.images(final),
        seconds=median(times),
    )


def trajectory_error(denoise: Denoise, reference: ReferenceTrajectory) -> TrajectoryError:
    """Measure a denoiser along the float model's trajectory and on its own."""
    times: list[float] = []
    denoise = timed(denoise, times)
    errors = [
        relative_error(denoise(step.sample, torch.full((len(step.sample),), step.timestep)), step.prediction) for step in reference.steps
    ]
    source, steps = reference.source, reference.settings.steps
    final = last_sample(trajectory(denoise, _scheduler(source), reference.noise, steps=steps, sigmas=source.family_object.sigmas(steps)))
    images = reference.decoder.images(final)
    psnr = reference.decoder.psnr(images, reference.images)
    return TrajectoryError(noise_errors=tuple(errors), psnr=psnr, final=final, images=images, seconds=median(times))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected||^2 / ||expected||^2 over all elements."""
    return float((actual.double() - expected.double()).pow(2).sum() / expected.double().pow(2).sum())


def denoise_of_source(source: Source, conditioning: Conditioning) -> Denoise:
    """The float model, with conditioning and guidance."""

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        output = source.family_object.forward(source.model, conditioning.inputs(sample, timestep))
        return conditioning.combine(source.family_object.prediction(source.config, output))

    return denoise


def denoise_of_artifact(artifact: Artifact, conditioning: Conditioning) -> Denoise:
    """An artifact in the reference executor, with the runtime's timestep correction, conditioning and guidance."""
    reference = reference_with_correction(artifact)

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        output = reference(conditioning.inputs(sample, timestep))
        return conditioning.combine(artifact.family_object.prediction(artifact.config, output))

    return denoise


def denoise_of_engine(path: Path, conditioning: Conditioning, *, device: str | None = None) -> Denoise:
    """An engine on `device`, or on the default device of its backend; a batch outside its profile is split into batches inside it."""
    denoiser = load_denoiser(path, device=device)
    allowed = denoiser.manifest.profile.get("batch", ShapeRange(1, 1, 1 << 30))

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        inputs = conditioning.inputs(sample, timestep)
        count, pieces, start = len(inputs[SAMPLE]), [], 0
        for size in batch_sizes(count, allowed):
            pieces.append(_run(denoiser, {name: _rows(value, start, size) for name, value in inputs.items()}))
            start += size
        return conditioning.combine(denoiser.family.prediction(denoiser.manifest.config, torch.cat(pieces)[:count]))

    return denoise


def deterministic(source: Source) -> str:
    """Name of the deterministic scheduler: DDIM with eta 0 for a diffusion model, Euler for a flow-matching model."""
    (name,) = set(DETERMINISTIC) & set(schedulers_for(source.scheduler.config))
    return name


def _scheduler(source: Source) -> Any:  # diffusers' schedulers share no useful base class
    return scheduler_named(deterministic(source), source.scheduler.config)


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
