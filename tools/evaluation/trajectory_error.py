"""The float model's walk from noise to images, and another denoiser beside it: how far it is, step by step and at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from torch import Tensor

from calibration.data.prompts import prompts_of
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import reference_with_correction
from edm_deploy.errors import InputError
from edm_deploy.network.family import SAMPLE
from edm_deploy.network.graph_names import SCALE_INPUT
from edm_deploy.pipelines.guidance import Conditioning
from edm_deploy.pipelines.prompt_encoding import check_takes_prompts, conditioner_of, takes_prompts
from edm_deploy.pipelines.sampling import Denoise, Step, last_sample, trajectory
from edm_deploy.pipelines.schedulers import scheduler_named, schedulers_for
from edm_deploy.pipelines.source import Source
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy_tools.common.assets import ASSETS
from edm_deploy_tools.images.decoding import Decoder, decoder_of
from edm_deploy_tools.images.sample import batch_sizes

DETERMINISTIC = ("ddim", "flow-euler")  # the same noise always ends in the same image
PROMPTS = ASSETS / "prompts" / "evaluation.txt"  # none of those that models are calibrated with


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured on.

    Attributes:
        samples: Trajectories, all in one batch.
        steps: Inference steps of DDIM without fresh noise; of Euler where the model was trained by flow matching.
        seed: Of the first noise and of the conditioning.
        guidance: Scale of classifier-free or embedded guidance; None is what the model's samples are usually drawn with.
        prompts: What samples are told in turn, where the model takes text; none takes those of assets/prompts/evaluation.txt.
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


@dataclass(frozen=True, kw_only=True)
class ReferenceTrajectory:
    """The float model's own trajectories.

    Attributes:
        source: The float model.
        setup: What it was walked with.
        noise: float32 [B, ...], [B, C, H, W] but for packed latents.
        conditioning: What the samples are told, and how they are guided.
        origin: Where that comes from, in words.
        decoder: Makes images of samples.
        steps: In walking order; predictions are the guided ones.
        final: The samples at the end, [B, ...].
        images: What the decoder makes of them, [B, C, H, W].
        seconds: Median wall time of one forward pass of the batch.
    """

    source: Source
    setup: EvaluationSettings
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
        """Name of the one that walks."""
        return deterministic(self.source)

    @property
    def guidance(self) -> float | None:
        """Scale of the guidance; None where the model is not guided."""
        given = self.conditioning.conditional
        return (
            float(given[SCALE_INPUT][0]) if SCALE_INPUT in given else self.conditioning.scale if self.conditioning.unconditional else None
        )

    @property
    def timesteps(self) -> list[float]:
        """Timestep of each step."""
        return [step.timestep for step in self.steps]


@dataclass(frozen=True, kw_only=True)
class TrajectoryError:
    """How far a denoiser is from the float model.

    Attributes:
        noise_errors: For each step of the float model's walk, ||e_q - e_f||^2 / ||e_f||^2 over the batch.
        psnr: Of the final images, each model on its own walk from the same noise, in dB; `Decoder.words` says of what.
        final: This denoiser's own final samples.
        images: What the decoder makes of them, [B, C, H, W].
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


def reference_trajectory(source: Source, setup: EvaluationSettings) -> ReferenceTrajectory:
    """Walk the float model.

    Raises:
        InputError: Prompts or a guidance scale for a model that takes none.
        ArtifactError: A text encoder or the VAE cannot be read.
    """
    if setup.prompts:
        check_takes_prompts(source)
    conditioner = conditioner_of(source, scale=setup.guidance, prompts=(setup.prompts or prompts_of(PROMPTS))[: setup.samples])
    generator = torch.Generator().manual_seed(setup.seed)
    noise = torch.randn(setup.samples, *source.family_object.latent_shape(source.config), generator=generator)
    conditioning = conditioner.of(conditioner.draw(setup.samples, generator, in_turn=takes_prompts(source)))
    times: list[float] = []
    denoise = timed(denoise_of_source(source, conditioning), times)
    steps = tuple(trajectory(denoise, _scheduler(source), noise, steps=setup.steps, sigmas=source.family_object.sigmas(setup.steps)))
    decoder, final = decoder_of(source), steps[-1].next_sample
    return ReferenceTrajectory(
        source=source,
        setup=setup,
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
    """Measure a denoiser beside the float model's walk and on its own."""
    times: list[float] = []
    denoise = timed(denoise, times)
    errors = [
        relative_error(denoise(step.sample, torch.full((len(step.sample),), step.timestep)), step.prediction) for step in reference.steps
    ]
    source, steps = reference.source, reference.setup.steps
    final = last_sample(trajectory(denoise, _scheduler(source), reference.noise, steps=steps, sigmas=source.family_object.sigmas(steps)))
    images = reference.decoder.images(final)
    psnr = reference.decoder.psnr(images, reference.images)
    return TrajectoryError(noise_errors=tuple(errors), psnr=psnr, final=final, images=images, seconds=median(times))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """||found - expected||^2 / ||expected||^2 over all elements."""
    return float((found.double() - expected.double()).pow(2).sum() / expected.double().pow(2).sum())


def denoise_of_source(source: Source, conditioning: Conditioning) -> Denoise:
    """The float model, guided as the conditioning says."""

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        output = source.family_object.forward(source.model, conditioning.inputs(sample, timestep))
        return conditioning.combine(source.family_object.prediction(source.config, output))

    return denoise


def denoise_of_artifact(artifact: Artifact, conditioning: Conditioning) -> Denoise:
    """An artifact, computed by the reference executor with all that a runtime does around it, guided likewise."""
    reference = reference_with_correction(artifact)

    def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
        output = reference(conditioning.inputs(sample, timestep))
        return conditioning.combine(artifact.family_object.prediction(artifact.config, output))

    return denoise


def denoise_of_engine(path: Path, conditioning: Conditioning, *, device: str | None = None) -> Denoise:
    """An engine on `device`, or where its backend runs; a batch that its profile does not take is cut into ones that it does."""
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
    """Name of the scheduler that is walked with: DDIM without fresh noise for a diffusion, Euler for a flow."""
    (name,) = set(DETERMINISTIC) & set(schedulers_for(source.scheduler.config))
    return name


def _scheduler(source: Source) -> Any:  # diffusers' schedulers share no useful base class
    return scheduler_named(deterministic(source), source.scheduler.config)


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
