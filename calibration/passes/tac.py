"""TAC: correction of the predicted noise and of the sample by timestep and channel, outside the network, after any recipe.

Source: Yao et al., Timestep-Aware Correction for Quantized Diffusion Models, ECCV 2024, arXiv 2407.03917: noise estimation reconstruction (the
scale) and input bias correction (the shift). No code was released; the closed form was checked against the re-implementation in SegQuant's
baselines (github.com/OptiSys-ZJU/segquant at 125659c).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from calibration.base_pass import Pass, PassContext
from calibration.data.noise_schedules import Schedule, calibrated_timesteps, schedule_of
from calibration.data.trajectory_pool import FORWARD_BATCH
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.timestep_correction import Correction, channel_axis
from edm_deploy.numerics.activation_table import nearest_rows

Predict = Callable[[Tensor, Tensor], Tensor]  # sample float32 [B, ...] and timestep float32 [B] -> prediction float32 [B, ...]


@dataclass(frozen=True, kw_only=True)
class Tac(Pass):
    """Estimated along the corrected trajectory: each timestep is corrected before the next one is reached.

    Attributes:
        ridge: Weight of (scale - 1)^2 relative to the squared error, both in units of the prediction's mean square. Source: lambda_2, 0.1.
        relative: Weight of the element-wise relative error in the objective of the scale. Source: lambda_1.
        threshold: Elements with a larger relative error are excluded from the relative term. Source: 4.
        shift: Whether the sample is corrected too. Source: yes.
        samples: Trajectories. Source: 32.
        steps: Number of corrected timesteps; None is the recipe's number of table rows.
    """

    name: ClassVar[str] = "tac"
    ridge: float = 0.1
    relative: float = 0.0
    threshold: float = 4.0
    shift: bool = True
    samples: int = 32
    steps: int | None = None

    def __post_init__(self) -> None:
        at_least("tac.ridge", self.ridge, 0.0)
        within("tac.relative", self.relative, 0.0, 1.0)
        at_least("tac.threshold", self.threshold, 0.0)
        at_least("tac.samples", self.samples, 1)
        if self.steps is not None:
            at_least("tac.steps", self.steps, 1)

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with its correction."""
        steps = self.steps or context.recipe.rows
        timesteps = calibrated_timesteps(context.source.scheduler, steps, context.source.family_object.sigmas(steps))
        generator = torch.Generator().manual_seed(context.recipe.seed + 1)  # other samples than those the ranges were observed on
        shape = context.source.family_object.latent_shape(context.source.config)
        noise = torch.randn(self.samples, *shape, generator=generator).to(context.device)
        conditioning = {name: value.to(context.device) for name, value in context.conditioner.draw(self.samples, generator).items()}
        student.compute_dtype = torch.float32
        # A new teacher: the recipe's may compute in bfloat16 by now.
        teacher, quantized = (_predict(model, context, conditioning) for model in (Teacher(context.source, context.device), student))
        scale, input_bias = self.estimate(teacher, quantized, schedule_of(context.source.scheduler, timesteps), noise)
        rows = nearest_rows(timesteps, artifact.num_train_timesteps)
        return replace(artifact, correction=Correction(row_of_timestep=rows, scale=scale, input_bias=input_bias))

    @torch.no_grad()
    def estimate(self, teacher: Predict, student: Predict, schedule: Schedule, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and input bias, float32 [R, C] each, rows ascending with the timestep.

        Both networks sample from the same noise, deterministically; the student as in deployment, corrected at every timestep passed so far.

        Args:
            teacher: Float network.
            student: Quantized network.
            schedule: R timesteps.
            noise: float32 [B, ...].
        """
        teacher_sample, student_sample = noise, noise
        scales, biases = [], []
        for position, value in enumerate(schedule.timesteps):
            timestep, positions = value.float().to(noise.device).expand(len(noise)), torch.full((len(noise),), position)
            bias = _channel_mean(student_sample - teacher_sample) if self.shift else torch.zeros_like(_channel_mean(student_sample))
            target = teacher(teacher_sample, timestep)
            prediction = student(student_sample - _across(bias, student_sample), timestep)
            scale = self.scale(prediction, target)
            corrected = _across(scale, student_sample) * prediction
            teacher_sample = schedule.previous(teacher_sample, target, positions, torch.zeros_like(noise), 0.0)
            student_sample = schedule.previous(student_sample, corrected, positions, torch.zeros_like(noise), 0.0)
            scales.append(scale)
            biases.append(bias)
        return torch.stack(scales).flip(0).cpu(), torch.stack(biases).flip(0).cpu()

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


def _predict(model: Teacher | Student, context: PassContext, values: dict[str, Tensor]) -> Predict:
    """A network's combined prediction, in batches."""

    def predict(sample: Tensor, timestep: Tensor) -> Tensor:
        parts = []
        for indices in torch.split(torch.arange(len(sample)), FORWARD_BATCH):
            conditioning = context.conditioner.of({name: value[indices] for name, value in values.items()})
            parts.append(conditioning.combine(model(conditioning.inputs(sample[indices], timestep[indices])).float()))
        return torch.cat(parts)

    return predict


def _channel_mean(values: Tensor) -> Tensor:
    """float32 [C] of [B, ...]."""
    return values.movedim(channel_axis(values), 0).flatten(1).mean(1)


def _across(values: Tensor, like: Tensor) -> Tensor:
    """[C] reshaped to broadcast along the channels of `like`."""
    shape = [1] * like.ndim
    shape[channel_axis(like)] = -1
    return values.reshape(shape)
