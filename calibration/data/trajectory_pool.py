"""Data-free inputs: a pool of samples at different timesteps of their sampling trajectories, which the teacher's predictions advance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.pipelines.guidance import Conditioner, Conditioning
from edm_deploy.pipelines.noise_schedules import schedule_of
from edm_deploy.pipelines.source import Source

FORWARD_BATCH = 32  # samples per forward pass without gradients


@dataclass(frozen=True)
class Batch:
    """Samples taken from the pool.

    Attributes:
        indices: int64 [B], their indices in the pool.
        sample: float32 [B, ...], noisy samples as the schedule defines them.
        timestep: float32 [B].
        conditioning: Labels, text embeddings and guidance.
    """

    indices: Tensor
    sample: Tensor
    timestep: Tensor
    conditioning: Conditioning

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, members: slice) -> Batch:
        """Some of the samples; the batch itself if these are all."""
        chosen = torch.arange(len(self))[members]
        if len(chosen) == len(self):
            return self
        return Batch(self.indices[members], self.sample[members], self.timestep[members], self.conditioning.of_members(chosen))

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Graph inputs by name: [B, ...] each, or [2 B, ...] under classifier-free guidance."""
        return self.conditioning.inputs(self.sample, self.timestep)


class Trajectories:
    """A pool of samples, used cyclically: once staggered over the schedule, all batches are balanced over the rows.

    Always true: sample i is at `schedule.timesteps[position[i]]`. All random numbers come from one CPU generator, in a fixed order.

    Args:
        source: The model, its scheduler and family.
        timesteps: int32 [R] ascending: the timesteps of a trajectory.
        size: Number of samples in the pool.
        eta: Share of fresh noise in each step, 0 to 1.
        seed: Seed of the noise and the conditioning.
        device: Device of the samples.
        conditioner: Draws the conditioning; None draws it at random, with the family's guidance.
    """

    position: Tensor
    next_index: int
    sample: Tensor
    conditioning: dict[str, Tensor]

    def __init__(
        self,
        source: Source,
        timesteps: Tensor,
        *,
        size: int,
        eta: float,
        seed: int,
        device: torch.device,
        conditioner: Conditioner | None = None,
    ) -> None:
        self.schedule = schedule_of(source.scheduler, timesteps)
        self.shape = source.family_object.latent_shape(source.config)
        self.conditioner = conditioner or Conditioner(source.family_object, source.config)
        self.size, self.eta, self.device = size, eta, device
        self.generator = torch.Generator().manual_seed(seed)
        self.restart()

    @property
    def rows(self) -> int:
        """Number of timesteps of a trajectory."""
        return len(self.schedule.timesteps)

    def next_batch(self, count: int) -> Batch:
        """The next `count` samples of the pool, cyclically."""
        indices = (self.next_index + torch.arange(count)) % self.size
        self.next_index = (self.next_index + count) % self.size
        return self._batch(indices)

    def batch_sizes(self, batch: int) -> set[int]:
        """Sizes of the batches of `traverse_schedule(batch)`."""
        return {len(indices) for indices in torch.split(torch.arange(self.size), batch)}

    def advance(self, batch: Batch, prediction: Tensor) -> None:
        """Move the samples of a batch one timestep further; finished samples restart from noise.

        Args:
            batch: A batch of this pool.
            prediction: float [B, ...], combined under classifier-free guidance.
        """
        indices = batch.indices
        self.sample[indices] = self._stepped(indices, prediction)
        self.position[indices] += 1
        finished = indices[self.position[indices] == self.rows]
        if len(finished):
            self.sample[finished] = self._noise(len(finished))
            self.position[finished] = 0
            for name, value in self._conditioning(len(finished)).items():
                self.conditioning[name][finished] = value

    def traverse_schedule(self, batch: int) -> Iterator[tuple[int, list[Batch]]]:
        """Move all samples once through the whole schedule, and leave them evenly staggered over it.

        Yields:
            The table row (ascending with the timestep) and its batches of up to `batch` samples; the caller calls `advance` on each.
        """
        staggered = torch.empty_like(self.sample)
        conditioning = {name: value.clone() for name, value in self.conditioning.items()}
        target = torch.arange(self.size) % self.rows if self.size >= self.rows else torch.arange(self.size) * self.rows // self.size
        for position in range(self.rows):
            staggered[target == position] = self.sample[target == position]
            yield self.rows - 1 - position, [self._batch(indices) for indices in torch.split(torch.arange(self.size), batch)]
        self.sample, self.position, self.conditioning = staggered, target, conditioning

    def restart(self) -> None:
        """Restart all samples: new noise and conditioning at the first timestep."""
        self.position = torch.zeros(self.size, dtype=torch.int64)
        self.next_index = 0
        self.sample = self._noise(self.size)
        self.conditioning = self._conditioning(self.size)

    def state(self) -> dict[str, Tensor]:
        """Everything that determines the following batches, by name."""
        state = {"sample": self.sample, "position": self.position, "next_member": torch.tensor([self.next_index])}
        state["generator"] = self.generator.get_state()
        return state | {f"conditioning.{name}": value for name, value in self.conditioning.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the result of `state`."""
        self.sample = state["sample"].to(self.device)
        self.position = state["position"].clone()
        self.next_index = int(state["next_member"])
        self.generator.set_state(state["generator"])
        self.conditioning = {name: state[f"conditioning.{name}"].to(self.device) for name in self.conditioning}

    def _batch(self, indices: Tensor) -> Batch:
        timestep = self.schedule.timesteps[self.position[indices]].float().to(self.device)
        conditioning = {name: value[indices] for name, value in self.conditioning.items()}
        return Batch(indices, self.sample[indices], timestep, self.conditioner.of(conditioning))

    def _stepped(self, indices: Tensor, prediction: Tensor) -> Tensor:
        noise = self._noise(len(indices)) if self.eta else torch.zeros_like(self.sample[indices])
        return self.schedule.previous(self.sample[indices], prediction.float(), self.position[indices], noise, self.eta)

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=self.generator).to(self.device)

    def _conditioning(self, count: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.conditioner.draw(count, self.generator).items()}
