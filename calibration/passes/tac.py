"""TAC: correction of the predicted noise and of the sample by timestep and channel, outside the network, after any recipe.

Source: Yao et al., Timestep-Aware Correction for Quantized Diffusion Models, ECCV 2024, arXiv 2407.03917: noise estimation reconstruction (the
scale) and input bias correction (the shift). No code was released; the closed form was checked against the re-implementation in SegQuant's
baselines (github.com/OptiSys-ZJU/segquant at 125659c).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from calibration.base_pass import Pass, PassContext
from calibration.data.trajectory_pool import FORWARD_BATCH
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.timestep_correction import Correction, channel_axis
from edm_deploy.numerics.activation_table import nearest_rows
from edm_deploy.pipelines.noise_schedules import Schedule, calibrated_timesteps, schedule_of
from edm_deploy.pipelines.sampling import Denoise

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Estimate:
    """A correction, and what it gains on trajectories that it was not estimated on.

    Attributes:
        scale, input_bias: float32 [R, C] each, rows ascending with the timestep.
        gains: float32 [M], for each held-out trajectory the squared error of the final sample without the correction minus that with it, in units of
            the mean error without it.
    """

    scale: Tensor
    input_bias: Tensor
    gains: Tensor

    @property
    def helps(self) -> bool:
        """Whether the mean gain exceeds its standard error; a single trajectory has none."""
        return len(self.gains) > 1 and bool(self.gains.mean() > self.gains.std() / len(self.gains) ** 0.5)


@dataclass(frozen=True, kw_only=True)
class Tac(Pass):
    """Estimated along the corrected trajectory: each timestep is corrected before the next one is reached.

    The correction is estimated on a part of the trajectories. Scale and bias are shrunk towards no correction by their own sampling error: the factor of
    an estimate m with sampling variance v is `max(0, 1 - v / m^2)` (James-Stein, positive part). On the others the final samples are compared with and
    without the correction; where it does not lower their error by more than the standard error, the artifact has none, and its provenance states this.

    Deviations from the source:

    - The scale is estimated against the float model's prediction for the student's own sample. Against its prediction on its own trajectory it also
      measures how far the two trajectories have parted: at the last step of the shipped model at W4A4 it was 0.27 then, and lowered the PSNR.
    - The relative term is off by default: it gives small elements of the prediction, whose errors are the largest in relation, the most weight. It
      is normalized per element, whereas SegQuant's has a factor C H W.
    - The shift is off by default. The source moves the sample that the scheduler continues with; the runtime here corrects a network's input and output, so
      that the scheduler keeps the biased sample, and the network no longer sees the bias that it would remove.

    Attributes:
        ridge: Weight of (scale - 1)^2 relative to the squared error, both in units of the prediction's mean square. Source: lambda_2, 0.1.
        relative: Weight of the element-wise relative error in the objective of the scale, 0 to 1. Source: lambda_1, 0.8 in SegQuant's configuration.
        threshold: Elements with a larger relative error are excluded from the relative term. Source: none; SegQuant's threshold of 4 is another quantity: at
            run time it applies the scale only to elements above 4 times the mean magnitude of the prediction.
        shift: Whether the input of the network is shifted too. Source: yes, of the sample itself.
        samples: Trajectories. Source: 32.
        held_out: Share of the trajectories, rounded down, that the correction is tested on; 0 applies it in any case. Source: none.
        steps: Number of corrected timesteps; None is the recipe's number of table rows.
    """

    name: ClassVar[str] = "tac"
    ridge: float = 0.1
    relative: float = 0.0
    threshold: float = 4.0
    shift: bool = False
    samples: int = 32
    held_out: float = 0.5
    steps: int | None = None

    def __post_init__(self) -> None:
        at_least("tac.ridge", self.ridge, 0.0)
        within("tac.relative", self.relative, 0.0, 1.0)
        at_least("tac.threshold", self.threshold, 0.0)
        at_least("tac.samples", self.samples, 1)
        within("tac.held_out", self.held_out, 0.0, 0.9)
        if self.steps is not None:
            at_least("tac.steps", self.steps, 1)

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with its correction if that helps, and with the gain in its provenance."""
        steps = self.steps or context.recipe.rows
        timesteps = calibrated_timesteps(context.source.scheduler, steps, context.source.family_object.sigmas(steps))
        generator = torch.Generator().manual_seed(context.recipe.seed + 1)  # other samples than those the ranges were observed on
        shape = context.source.family_object.latent_shape(context.source.config)
        noise = torch.randn(self.samples, *shape, generator=generator).to(context.device)
        drawn = {name: value.to(context.device) for name, value in context.conditioner.draw(self.samples, generator).items()}
        conditioning = context.conditioner.of(drawn)
        student.compute_dtype = torch.float32
        # A new teacher: the recipe's may compute in bfloat16 by now.
        teacher, quantized = (conditioning.denoiser(model, FORWARD_BATCH) for model in (Teacher(context.source, context.device), student))
        found = self.estimate(teacher, quantized, schedule_of(context.source.scheduler, timesteps), noise)
        applied, gain = found.helps or not self.held_out, float(found.gains.mean()) if len(found.gains) else 0.0
        note = {"tac": {"error_removed": round(gain, 4), "applied": applied}}
        artifact = replace(artifact, provenance=dict(artifact.provenance) | note)
        if not applied:
            log.warning(
                "Pass tac changes nothing: its correction removes %.1f %% of the error of samples it was not estimated on.", 100 * gain
            )
            return artifact
        rows = nearest_rows(timesteps, artifact.num_train_timesteps)
        return replace(artifact, correction=Correction(row_of_timestep=rows, scale=found.scale, input_bias=found.input_bias))

    @torch.no_grad()
    def estimate(self, teacher: Denoise, student: Denoise, schedule: Schedule, noise: Tensor) -> Estimate:
        """The correction, shrunk by its sampling error, and its gain.

        All networks sample from the same noise, deterministically; the corrected student as in deployment, corrected at every timestep passed so far.

        Args:
            teacher: Float network.
            student: Quantized network.
            schedule: R timesteps.
            noise: float32 [B, ...]; the last `held_out` of them are not estimated on.
        """
        used = len(noise) - int(len(noise) * self.held_out)
        still = torch.zeros_like(noise)
        float_sample = corrected_sample = plain_sample = noise
        scales, biases = [], []
        for position, value in enumerate(schedule.timesteps):
            timestep, positions = value.float().to(noise.device).expand(len(noise)), torch.full((len(noise),), position)

            def step(sample: Tensor, prediction: Tensor, positions: Tensor = positions) -> Tensor:
                return schedule.previous(sample, prediction, positions, still, 0.0)

            shifts = _means((corrected_sample - float_sample)[:used])
            bias = shrunk(shifts) if self.shift else torch.zeros_like(shifts[0])
            moved = corrected_sample - _across(bias, noise)
            prediction, target = student(moved, timestep), teacher(moved, timestep)
            scale = 1 + shrunk(self.scales(prediction[:used], target[:used]) - 1, mean=self.scale(prediction[:used], target[:used]) - 1)
            float_sample = step(float_sample, teacher(float_sample, timestep))
            plain_sample = step(plain_sample, student(plain_sample, timestep))
            corrected_sample = step(corrected_sample, _across(scale, noise) * prediction)
            scales.append(scale)
            biases.append(bias)
        plain, corrected = ((sample - float_sample)[used:].square().flatten(1).mean(1).cpu() for sample in (plain_sample, corrected_sample))
        gains = (plain - corrected) / plain.mean().clamp(min=torch.finfo(plain.dtype).tiny) if len(plain) else plain
        return Estimate(torch.stack(scales).flip(0).cpu(), torch.stack(biases).flip(0).cpu(), gains)

    def scales(self, prediction: Tensor, target: Tensor) -> Tensor:
        """`scale` of each trajectory alone, float32 [B, C]."""
        return torch.stack(
            [self.scale(each, expected) for each, expected in zip(torch.split(prediction, 1), torch.split(target, 1), strict=True)]
        )

    def scale(self, prediction: Tensor, target: Tensor) -> Tensor:
        """The scale K of each channel, in closed form; exactly 1 where q, the prediction, equals r, the target.

        With p the mean of r^2 it minimizes

            (1 - relative) mean((K q - r)^2) + relative p mean((K q / r - 1)^2) + ridge p (K - 1)^2.

        Args:
            prediction: float32 [B, ...].
            target: float32, the same shape.

        Returns:
            float32 [C].
        """
        power = _channel_mean(target.square())
        included = ((prediction - target).abs() <= self.threshold * target.abs()) & (target != 0)
        ratio = torch.where(included, prediction / target, 0.0)
        absolute, relative = 1 - self.relative, self.relative * power
        numerator = absolute * _channel_mean(prediction * target) + relative * _channel_mean(ratio) + self.ridge * power
        denominator = absolute * _channel_mean(prediction.square()) + relative * _channel_mean(ratio.square()) + self.ridge * power
        return torch.where(denominator > 0, numerator / denominator, 1.0)


PASS = Tac


def shrunk(values: Tensor, *, mean: Tensor | None = None) -> Tensor:
    """The mean of each channel, times the share of its square that is not sampling error: `max(0, 1 - v / m^2)`, v the variance of the mean.

    Args:
        values: float32 [B, C], one for each trajectory; a single one is all sampling error.
        mean: float32 [C], a better estimate of the mean than that of `values`.

    Returns:
        float32 [C].

    Source: Efron and Morris, Stein's Estimation Rule and Its Competitors, JASA 68, 1973 (positive part, one mean at a time).
    """
    mean = values.mean(0) if mean is None else mean
    if len(values) < 2:
        return torch.zeros_like(mean)
    square = mean.square()
    return torch.where(square > 0, mean * (1 - values.var(0) / len(values) / square).clamp(min=0), 0.0)


def _means(values: Tensor) -> Tensor:
    """Mean of each sample's channels: float32 [B, C] of [B, ...]."""
    return values.movedim(channel_axis(values), 1).flatten(2).mean(2)


def _channel_mean(values: Tensor) -> Tensor:
    """float32 [C] of [B, ...]."""
    return values.movedim(channel_axis(values), 0).flatten(1).mean(1)


def _across(values: Tensor, like: Tensor) -> Tensor:
    """[C] reshaped to broadcast along the channels of `like`."""
    shape = [1] * like.ndim
    shape[channel_axis(like)] = -1
    return values.reshape(shape)
