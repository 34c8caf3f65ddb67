"""The one walk from noise to sample: any diffusers scheduler, any denoiser. Samplers walk; they never train."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]  # (sample [B, ...], timestep float32 [B]) -> prediction [B, ...]


@dataclass(frozen=True)
class Step:
    """One step of a trajectory.

    Attributes:
        index: Position in the schedule, 0 is the noisiest.
        timestep: In the units of the training schedule; fractional for some schedulers.
        sample: What went into the denoiser, [B, ...], already scaled for it.
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
    sigmas: Sequence[float] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    options: Mapping[str, float] | None = None,
) -> Iterator[Step]:
    """Walk from noise to a sample.

    Args:
        denoise: The denoiser; conditioning is already bound in it.
        scheduler: Any diffusers scheduler; its timesteps are set here.
        noise: float [B, ...], standard normal; scaled by the scheduler's `init_noise_sigma` here.
        steps: Number of inference steps.
        sigmas: As `set_steps`.
        generator: Where a stochastic scheduler draws its noise.
        options: Further arguments of `scheduler.step`, such as `eta`; the ones that it does not take are left out.

    Yields:
        One `Step` for each timestep.
    """
    set_steps(scheduler, steps, sigmas)
    sample = noise * float(getattr(scheduler, "init_noise_sigma", 1.0))  # flow matching starts from the noise itself, and scales no input
    accepted = inspect.signature(scheduler.step).parameters
    extra: dict[str, Any] = {key: value for key, value in (options or {}).items() if key in accepted}
    if "generator" in accepted:
        extra["generator"] = generator
    for index, timestep in enumerate(scheduler.timesteps):
        scaled = scheduler.scale_model_input(sample, timestep) if hasattr(scheduler, "scale_model_input") else sample
        prediction = denoise(scaled, timestep.to(noise.device, torch.float32).expand(len(noise)))
        sample = scheduler.step(prediction, timestep, sample, return_dict=False, **extra)[0]
        yield Step(index, float(timestep), scaled, prediction, sample)


def is_flow(scheduler: Any) -> bool:  # Any: as above
    """Whether a diffusers scheduler walks a flow (sigmas from 1 to 0, a velocity predicted) rather than a diffusion."""
    return type(scheduler).__name__.startswith("FlowMatch")


def set_steps(scheduler: Any, steps: int, sigmas: Sequence[float] | None = None) -> None:  # Any: as above
    """Set the scheduler's timesteps; where it shifts them by the size of the image, as for an image of the largest size that it knows.

    Args:
        scheduler: A diffusers scheduler.
        steps: How many.
        sigmas: Noise levels, descending, before any shift: `Family.sigmas`. None, or a scheduler that takes none, spaces them by itself.

    Source: Esser et al., arXiv 2403.03206, section 5.3.2 (the shift, whose logarithm diffusers calls mu).
    """
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    options: dict[str, Any] = {}
    if "mu" in accepted and scheduler.config.get("use_dynamic_shifting", False):
        options["mu"] = float(scheduler.config.max_shift)
    if sigmas is not None and "sigmas" in accepted:
        options["sigmas"] = list(sigmas)
    scheduler.set_timesteps(steps, **options)


def last_sample(steps: Iterator[Step]) -> Tensor:
    """The sample that a trajectory ends in."""
    (last,) = deque(steps, maxlen=1)
    return last.next_sample
