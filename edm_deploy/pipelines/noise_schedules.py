"""Timesteps of a trajectory and its sampling step, with each sample at its own timestep: diffusion's alphas, flow matching's sigmas."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.codes import per_channel
from edm_deploy.pipelines.sampling import is_flow, set_steps


def calibrated_timesteps(
    scheduler: Any,  # diffusers' schedulers share no useful base class
    rows: int,
    sigmas: Sequence[float] | None = None,
) -> Tensor:
    """The timesteps of sampling in `rows` steps with the model's own scheduler, rounded to integers: int32 [R], ascending.

    Args:
        scheduler: The model's own.
        rows: Number of sampling steps.
        sigmas: Sigmas as the model's pipeline sets them, `Family.sigmas`; None leaves them to the scheduler.

    Raises:
        InputError: More rows than the schedule has timesteps.
    """
    length = int(scheduler.config.num_train_timesteps)
    if rows > length:
        raise InputError(f"rows is {rows}, but the model's schedule has {length} timesteps. Set rows to {length} or fewer.")
    scheduler = copy.deepcopy(scheduler)
    set_steps(scheduler, rows, sigmas)
    stops = torch.as_tensor(scheduler.timesteps).double().round().clamp(0, length - 1)
    return torch.tensor(sorted({int(stop) for stop in stops}), dtype=torch.int32)


class Schedule(Protocol):
    """Sampling step of a scheduler, for samples at different timesteps.

    Attributes:
        timesteps: [R], descending, in the units of the training schedule.
    """

    @property
    def timesteps(self) -> Tensor:
        """[R], descending."""

    def previous(self, sample: Tensor, prediction: Tensor, positions: Tensor, noise: Tensor, eta: float) -> Tensor:
        """One step, each sample from its own position.

        Args:
            sample: float32 [B, ...].
            prediction: float32, the same shape.
            positions: int64 [B], indices into `timesteps`.
            noise: float32, the same shape, standard normal.
            eta: Share of fresh noise: 0 is none, 1 as much as the process allows.

        Returns:
            float32, the same shape: the samples one position further.
        """


@dataclass(frozen=True)
class DiffusionSchedule:
    """Diffusion: a sample is sqrt(alpha) clean + sqrt(1 - alpha) noise.

    Attributes:
        timesteps: int64 [R], descending.
        alphas: float64 [R + 1], the cumulative alpha at each timestep; the last is that of the finished sample.
        prediction: Prediction type: `epsilon`, `v_prediction` or `sample`.
        clip: Bound of the predicted clean sample, or None.
    """

    timesteps: Tensor
    alphas: Tensor
    prediction: str
    clip: float | None

    def previous(self, sample: Tensor, prediction: Tensor, positions: Tensor, noise: Tensor, eta: float) -> Tensor:
        """One DDIM step; eta 1 adds as much noise as DDPM.

        Source: DDIM, arXiv 2010.02502, equations 12 and 16.
        """
        now, then = self.alphas[positions.cpu()], self.alphas[positions.cpu() + 1]
        sigma = eta * ((1 - then) / (1 - now) * (1 - now / then)).clamp(min=0).sqrt()
        a, b, a_then, direction, sigma = (
            per_channel(value.float(), sample).to(sample.device)
            for value in (now.sqrt(), (1 - now).sqrt(), then.sqrt(), (1 - then - sigma**2).clamp(min=0).sqrt(), sigma)
        )
        match self.prediction:
            case "epsilon":
                clean, epsilon = (sample - b * prediction) / a, prediction
            case "v_prediction":
                clean, epsilon = a * sample - b * prediction, a * prediction + b * sample
            case _:
                clean, epsilon = prediction, (sample - a * prediction) / b
        if self.clip is not None:
            clean = clean.clamp(-self.clip, self.clip)
        return a_then * clean + direction * epsilon + sigma * noise


@dataclass(frozen=True)
class FlowSchedule:
    """Flow matching: a sample is (1 - sigma) clean + sigma noise, and the model predicts the velocity noise - clean.

    Attributes:
        sigmas: float64 [R + 1], descending; the last is 0, that of the finished sample.
        length: Timesteps of the training schedule: timestep = sigma * length.
    """

    sigmas: Tensor
    length: int

    @property
    def timesteps(self) -> Tensor:
        """float32 [R], descending."""
        return (self.sigmas[:-1] * self.length).float()

    def previous(self, sample: Tensor, prediction: Tensor, positions: Tensor, noise: Tensor, eta: float) -> Tensor:
        """One Euler step along the velocity. eta interpolates linearly towards the estimated clean sample re-noised with fresh noise.

        Source: Lipman et al., Flow Matching for Generative Modeling, arXiv 2210.02747, section 2; Esser et al., arXiv 2403.03206, equation 1.
        """
        now, then = (per_channel(self.sigmas[index].float(), sample).to(sample.device) for index in (positions.cpu(), positions.cpu() + 1))
        straight = sample + (then - now) * prediction
        if not eta:
            return straight
        renoised = (1 - then) * (sample - now * prediction) + then * noise
        return torch.lerp(straight, renoised, eta)


def schedule_of(scheduler: Any, timesteps: Tensor) -> Schedule:  # Any: as above
    """The schedule of a diffusers scheduler at `timesteps`, int [R] ascending.

    Raises:
        UnsupportedError: It is neither flow matching nor a diffusion schedule with cumulative alphas, or its prediction type is unknown.
    """
    descending = timesteps.long().flip(0)
    if is_flow(scheduler):
        if scheduler.config.get("invert_sigmas", False):
            raise UnsupportedError(
                f"{type(scheduler).__name__} with invert_sigmas has ascending sigmas; trajectories need descending ones. Set invert_sigmas to false."
            )
        length = int(scheduler.config.num_train_timesteps)
        sigmas = descending.double() / length
        # Flow matching starts at sigma 1, timestep `length`, which has no row; the last timestep, `length - 1`, represents it.
        sigmas[descending == length - 1] = 1.0
        return FlowSchedule(torch.cat([sigmas, sigmas.new_zeros(1)]), length)
    alphas = getattr(scheduler, "alphas_cumprod", None)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if alphas is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} with prediction type {prediction!r} is not supported; "
            "expected flow matching, or a diffusion schedule that predicts epsilon, v_prediction or sample."
        )
    final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double().reshape(1)
    clip = float(scheduler.config.get("clip_sample_range", 1.0)) if scheduler.config.get("clip_sample", False) else None
    return DiffusionSchedule(descending, torch.cat([alphas.double().cpu()[descending], final]), prediction, clip)
