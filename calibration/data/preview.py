"""Samples of student and teacher from the same noise, to be looked at while the student is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps, schedule_of
from edm_deploy.pipelines.source import Source

COUNT, STEPS = 4, 20  # samples, and deterministic sampling steps of each


class Preview:
    """Fixed noise and conditioning, drawn apart from those of the training, which a preview does not change.

    Args:
        source: The model, its scheduler and family.
        conditioner: Draws the conditioning.
        device: Of the samples.
        seed: Of noise and conditioning.
    """

    def __init__(self, source: Source, conditioner: Conditioner, *, device: torch.device, seed: int) -> None:
        steps = min(STEPS, source.num_train_timesteps)
        self.schedule = schedule_of(source.scheduler, calibrated_timesteps(source.scheduler, steps, source.family_object.sigmas(steps)))
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(COUNT, *source.family_object.latent_shape(source.config), generator=generator).to(device)
        self.conditioning = conditioner.of({name: value.to(device) for name, value in conditioner.draw(COUNT, generator).items()})

    @torch.no_grad()
    def sample(self, network: Callable[[Mapping[str, Tensor]], Tensor]) -> Tensor:
        """Final samples of a network, float32 [COUNT, ...]."""
        denoise = self.conditioning.denoiser(lambda inputs: network(inputs).float(), COUNT)
        sample, zeros = self.noise, torch.zeros_like(self.noise)
        for position, timestep in enumerate(self.schedule.timesteps):
            prediction = denoise(sample, timestep.float().to(sample.device).expand(COUNT))
            sample = self.schedule.previous(sample, prediction, torch.full((COUNT,), position), zeros, 0.0)
        return sample
