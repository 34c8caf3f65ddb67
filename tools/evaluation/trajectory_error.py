"""Sampling trajectories of the float model, and the error of another denoiser along them: per step, and of the final images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from edm_deploy.adapters.fuse import merge_loras
from edm_deploy.errors import InputError
from edm_deploy.network.graph_names import SCALE_INPUT
from edm_deploy.numerics.seeds import check_seed
from edm_deploy.pipelines.decoding import Decoder, decibels, decoder_of
from edm_deploy.pipelines.guidance import Conditioner, Conditioning
from edm_deploy.pipelines.noise_schedules import schedule_of
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts, conditioner_of, takes_prompts
from edm_deploy.pipelines.prompt_file import read_prompts
from edm_deploy.pipelines.sampling import Denoise, Step, last_sample, trajectory
from edm_deploy.pipelines.schedulers import scheduler_named, schedulers_for
from edm_deploy.pipelines.source import Source
from edm_deploy.pipelines.step_weights import cached_step_weights
from edm_deploy_tools.common.assets import ASSETS
from edm_deploy_tools.common.loras import read_loras
from edm_deploy_tools.evaluation.denoisers import denoise_of_source, timed

MOST_SAMPLES = 64  # of an error of the prediction: an average over all elements, which needs fewer samples than those of images
RESAMPLES = 1000  # of a bootstrap interval
DETERMINISTIC = ("ddim", "flow-euler")  # schedulers without randomness: the same noise always gives the same image
PROMPTS = ASSETS / "prompts" / "evaluation.txt"  # disjoint from the prompts that models are calibrated with


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """The samples that models are evaluated on.

    Attributes:
        samples: Number of trajectories of each seed.
        steps: Inference steps: DDIM with eta 0, or Euler for a flow-matching model.
        seeds: Of the initial noise and of the conditioning, one or more.
        guidance: Scale of classifier-free or embedded guidance; None is the usual scale of the model.
        prompts: For a text-conditional model, assigned to samples cyclically; if empty, those of assets/prompts/evaluation.txt.
        loras: Files of LoRAs with their weights, which the float model and the evaluated ones have alike.
    """

    samples: int = 16
    steps: int = 20
    seeds: tuple[int, ...] = (123,)
    guidance: float | None = None
    prompts: tuple[str, ...] = ()
    loras: tuple[tuple[Path, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("samples", "steps"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} {getattr(self, name)}: expected 1 or more.")
        if len(set(self.seeds)) < max(len(self.seeds), 1):
            raise InputError(f"--seed {', '.join(map(str, self.seeds)) or 'none'}: expected one or more different seeds. Give each once.")
        for seed in self.seeds:
            check_seed(seed)

    @property
    def trajectories(self) -> int:
        """Number of trajectories of all seeds."""
        return self.samples * len(self.seeds)


@dataclass(frozen=True, kw_only=True)
class ReferenceTrajectory:
    """Sampling trajectories of the float model.

    Attributes:
        source: The float model, with the LoRAs of the settings.
        settings: Samples, steps, seeds, guidance, prompts.
        noise: Initial noise, float32 [B, ...], the samples of each seed in turn: [B, C, H, W] except for packed latents.
        conditioning: Conditioning and guidance of the samples.
        conditioner: Draws the conditioning; describes where it comes from.
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
    conditioner: Conditioner
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

    @cached_property
    def step_weights(self) -> Tensor:
        """For each step the squared change of the final sample for a squared error of the prediction, float32 [steps]; measured on first use."""
        return _step_weights(self.source, self.conditioner, self.timesteps)

    @property
    def timesteps(self) -> list[float]:
        """Timestep of each step."""
        return [step.timestep for step in self.steps]


@dataclass(frozen=True, kw_only=True)
class TrajectoryError:
    """Error of a denoiser with respect to the float model.

    Attributes:
        noise_errors: ||e_q - e_f||^2 / ||e_f||^2 over the first `MOST_SAMPLES` samples, for each step of the float model's trajectory.
        weighted_errors: Mean squared change of the final sample that the error of each step alone is expected to make: `step_weights` times the mean
            of (e_q - e_f)^2 over the same samples.
        psnrs: PSNR of the final images in dB for each seed, each model on its own trajectory from the same noise; `Decoder.words` describes the images.
        psnr_interval: 95 % interval of their mean over the seeds, in dB, by resampling the images of each seed.
        final: Final samples of this denoiser.
        images: Decoded final samples, [B, C, H, W].
        seconds: Median wall time of one forward pass of the batch.
    """

    noise_errors: tuple[float, ...]
    weighted_errors: tuple[float, ...]
    psnrs: tuple[float, ...]
    psnr_interval: tuple[float, float]
    final: Tensor
    images: Tensor
    seconds: float

    @property
    def noise_error(self) -> float:
        """Mean of the noise errors over the steps."""
        return fmean(self.noise_errors)

    @property
    def weighted_error(self) -> float:
        """Sum of the weighted errors over the steps."""
        return sum(self.weighted_errors)

    @property
    def psnr(self) -> float:
        """Mean PSNR over the seeds, in dB."""
        return fmean(self.psnrs)


def reference_trajectory(source: Source, settings: EvaluationSettings) -> ReferenceTrajectory:
    """Sample the trajectories of the float model, to whose weights the LoRAs of the settings are added, in place.

    Raises:
        InputError: Prompts or a guidance scale for a model that takes none, or a LoRA of another model.
        ArtifactError: A text encoder or the VAE cannot be read.
    """
    if settings.prompts:
        check_takes_prompts(source)
    prompts = (settings.prompts or read_prompts(PROMPTS))[: settings.samples]
    merge_loras(source.model, read_loras(source, settings.loras))
    conditioner = conditioner_of(source, scale=settings.guidance, prompts=prompts)
    noise, conditioning = _drawn(source, settings, conditioner)
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
        conditioner=conditioner,
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
    noise_errors, weighted_errors = [], []
    for step, weight in zip(reference.steps, reference.step_weights, strict=True):
        sample, expected = step.sample[:MOST_SAMPLES], step.prediction[:MOST_SAMPLES]
        prediction = denoise(sample, torch.full((len(sample),), step.timestep))
        noise_errors.append(relative_error(prediction, expected))
        weighted_errors.append(float(weight) * float((prediction.double() - expected.double()).square().mean()))
    source, steps = reference.source, reference.settings.steps
    final = last_sample(trajectory(denoise, _scheduler(source), reference.noise, steps=steps, sigmas=source.family_object.sigmas(steps)))
    images = reference.decoder.images(final)
    errors = [
        reference.decoder.squared_errors(found, expected)
        for found, expected in zip(*(torch.split(each, reference.settings.samples) for each in (images, reference.images)), strict=True)
    ]
    return TrajectoryError(
        noise_errors=tuple(noise_errors),
        weighted_errors=tuple(weighted_errors),
        psnrs=tuple(float(decibels(each.mean())) for each in errors),
        psnr_interval=psnr_interval(torch.stack(errors)),
        final=final,
        images=images,
        seconds=median(times),
    )


def psnr_interval(squared_errors: Tensor) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over the seeds of the PSNR, in dB.

    The percentiles of `RESAMPLES` means, each of as many images as there are, drawn with replacement from those of each seed.

    Args:
        squared_errors: `Decoder.squared_errors` of the images of each seed, float64 [seeds, images].

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section 13.3 (the percentile interval).
    """
    generator = torch.Generator().manual_seed(0)
    seeds, images = squared_errors.shape
    drawn = torch.randint(images, (seeds, RESAMPLES, images), generator=generator)
    means = squared_errors.unsqueeze(1).expand(-1, RESAMPLES, -1).gather(2, drawn).mean(2)
    low, high = decibels(means).mean(0).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return float(low), float(high)


def _drawn(source: Source, settings: EvaluationSettings, conditioner: Conditioner) -> tuple[Tensor, Conditioning]:
    """Initial noise and conditioning of the samples of every seed."""
    noise, drawn = [], []
    for seed in settings.seeds:
        generator = torch.Generator().manual_seed(seed)
        noise.append(torch.randn(settings.samples, *source.family_object.latent_shape(source.config), generator=generator))
        drawn.append(conditioner.draw(settings.samples, generator, in_turn=takes_prompts(source)))
    return torch.cat(noise), conditioner.of({name: torch.cat([part[name] for part in drawn]) for name in drawn[0]})


def _step_weights(source: Source, conditioner: Conditioner, timesteps: Sequence[float]) -> Tensor:
    """`edm_deploy.pipelines.step_weights` of a model at these timesteps, in their order: float32 [steps]."""
    last = source.num_train_timesteps - 1
    rounded = torch.tensor(timesteps).round().int().clamp(0, last)
    rows, row_of_step = torch.unique(rounded, return_inverse=True)
    weights = cached_step_weights(
        source.model,
        lambda inputs: source.family_object.prediction(source.config, source.family_object.forward(source.model, inputs)),
        schedule_of(source.scheduler, rows),
        conditioner,
        digest=source.digest(),
        device=torch.device("cpu"),
    )
    return weights.flip(0)[row_of_step]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected||^2 / ||expected||^2 over all elements."""
    return float((actual.double() - expected.double()).pow(2).sum() / expected.double().pow(2).sum())


def deterministic(source: Source) -> str:
    """Name of the deterministic scheduler: DDIM with eta 0 for a diffusion model, Euler for a flow-matching model."""
    (name,) = set(DETERMINISTIC) & set(schedulers_for(source.scheduler.config))
    return name


def _scheduler(source: Source) -> Any:  # diffusers' schedulers share no useful base class
    return scheduler_named(deterministic(source), source.scheduler.config)
