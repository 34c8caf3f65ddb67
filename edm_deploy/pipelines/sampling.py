"""The sampling loop, from noise to sample, for any diffusers scheduler and any denoiser."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import InputError, first_line
from edm_deploy.pipelines.schedulers import check_steps

Denoise = Callable[[Tensor, Tensor], Tensor]  # (sample [B, ...], timestep float32 [B]) -> prediction [B, ...]


@dataclass(frozen=True)
class Step:
    """One step of a trajectory.

    Attributes:
        index: Position in the schedule, 0 is the noisiest.
        timestep: In the units of the training schedule; fractional for some schedulers.
        sample: Input of the denoiser, [B, ...], after the scheduler's input scaling.
        prediction: Output of the denoiser.
        next_sample: The scheduler's sample for the next timestep.
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
    """Sample from noise, one scheduler step at a time.

    Args:
        denoise: The denoiser, with its conditioning bound.
        scheduler: Any diffusers scheduler; its timesteps are set here.
        noise: float [B, ...], standard normal; scaled by the scheduler's `init_noise_sigma` here.
        steps: Number of inference steps.
        sigmas: As `set_steps`.
        generator: Source of a stochastic scheduler's noise.
        options: Further arguments of `scheduler.step`, such as `eta`; those that the scheduler does not accept are left out.

    Yields:
        One `Step` for each timestep.

    Raises:
        InputError: As `set_steps`.
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
    """Whether a diffusers scheduler integrates a flow (sigmas from 1 to 0, velocity prediction) rather than a diffusion."""
    return type(scheduler).__name__.startswith("FlowMatch")


def set_steps(scheduler: Any, steps: int, sigmas: Sequence[float] | None = None) -> None:  # Any: as above
    """Set the scheduler's timesteps. A scheduler that shifts them by image size uses its largest shift.

    Args:
        scheduler: A diffusers scheduler.
        steps: Number of inference steps.
        sigmas: Noise levels before any shift, descending, as in `Family.sigmas`. The scheduler spaces them itself where this is None or where it
            accepts none.

    Raises:
        InputError: The scheduler has no such number of steps.

    Source: Esser et al., arXiv 2403.03206, section 5.3.2 (the shift, whose logarithm diffusers calls mu).
    """
    accepted = inspect.signature(scheduler.set_timesteps).parameters
    options: dict[str, Any] = {}
    if "mu" in accepted and scheduler.config.get("use_dynamic_shifting", False):
        options["mu"] = float(scheduler.config.max_shift)
    if sigmas is not None and "sigmas" in accepted:
        options["sigmas"] = list(sigmas)
    name, longest = type(scheduler).__name__, int(scheduler.config.num_train_timesteps)
    check_steps(steps)
    try:
        scheduler.set_timesteps(steps, **options)
    except (ValueError, IndexError) as err:
        raise InputError(f"{name} cannot sample in {steps} steps: {first_line(err)}. Choose another number of steps.") from err
    # Integer timesteps would repeat, which multistep schedulers meet with a failed assertion.
    if steps > longest and not scheduler.timesteps.is_floating_point():
        raise InputError(f"{name} cannot sample in {steps} steps: its training schedule has {longest}. Choose {longest} or fewer.")


def last_sample(steps: Iterator[Step]) -> Tensor:
    """The final sample of a trajectory, [B, ...]."""
    (last,) = deque(steps, maxlen=1)
    return last.next_sample
