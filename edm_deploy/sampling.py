"""The one walk from noise to sample: any diffusers scheduler, any denoiser. Samplers walk; they never train."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (sample [B, C, H, W], timestep float32 [B]) -> prediction [B, C, H, W]


@dataclass(frozen=True)
class Step:
    """One step of a trajectory.

    Attributes:
        index: Position in the schedule, 0 is the noisiest.
        timestep: In the units of the training schedule; fractional for some schedulers.
        sample: What went into the denoiser, [B, C, H, W], already scaled for it.
        prediction: What came out.
        next_sample: What the scheduler made of it.
    """

    index: int
    timestep: float
    sample: Tensor
    prediction: Tensor
    next_sample: Tensor


@torch.no_grad()
def trajectory(
    denoise: Denoise,
    scheduler: Any,  # diffusers' schedulers share no useful base class
    noise: Tensor,
    *,
    steps: int,
    generator: torch.Generator | list[torch.Generator] | None = None,
    options: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """Walk from noise to a sample.

    Args:
        denoise: The denoiser; conditioning is already bound in it.
        scheduler: Any diffusers scheduler; its timesteps are set here.
        noise: float [B, C, H, W], standard normal; scaled by the scheduler's `init_noise_sigma` here.
        steps: Number of inference steps.
        generator: Where a stochastic scheduler draws its noise.
        options: Further arguments of `scheduler.step`, such as `eta`; the ones that it does not take are left out.

    Yields:
        One `Step` for each timestep.
    """
    scheduler.set_timesteps(steps)
    sample = noise * float(scheduler.init_noise_sigma)
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {key: value for key, value in (options or {}).items() if key in accepted}
    if "generator" in accepted:
        extra["generator"] = generator
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, timestep)
        prediction = denoise(scaled, timestep.to(noise.device, torch.float32).expand(len(noise)))
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
        yield Step(index, float(timestep), scaled, prediction, sample)


def last_sample(steps: Iterator[Step]) -> Tensor:
    """The sample that a trajectory ends in."""
    (last,) = deque(steps, maxlen=1)
    return last.next_sample
