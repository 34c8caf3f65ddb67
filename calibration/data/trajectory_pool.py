"""Where inputs come from without data: a pool of samples in flight, each at a timestep of its own, led by the teacher's prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.data.noise_schedules import schedule_of
from edm_deploy.pipelines.guidance import Conditioner, Conditioning
from edm_deploy.pipelines.source import Source


@dataclass(frozen=True)
class Batch:
    """Samples taken from the pool.

    Attributes:
        members: int64 [B], their indices in the pool.
        sample: float32 [B, ...], as the schedule walks them.
        timestep: float32 [B].
        conditioning: What they are told.
    """

    members: Tensor
    sample: Tensor
    timestep: Tensor
    conditioning: Conditioning

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Graph inputs by name: [B, ...] each, or [2 B, ...] where the model is guided."""
        return self.conditioning.inputs(self.sample, self.timestep)


class Trajectories:
    """A pool of samples. Taken in turn, so that a pool staggered over the schedule gives batches balanced over the rows, for ever.

    Always: sample i stands at `schedule.timesteps[position[i]]`. All randomness is drawn from one CPU generator, in a fixed order.

    Args:
        source: The model, its scheduler and family.
        timesteps: int32 [R] ascending: where samples stop.
        size: Number of samples in flight.
        eta: Fresh noise of each step, 0 to 1.
        seed: Of the noise and the conditioning.
        device: Where the samples live.
        conditioner: Draws what they are told; None draws it at random and guides as the family does.
    """

    position: Tensor
    next_member: int
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
        """Number of timesteps that a trajectory visits."""
        return len(self.schedule.timesteps)

    def take(self, count: int) -> Batch:
        """The next `count` samples in turn."""
        members = (self.next_member + torch.arange(count)) % self.size
        self.next_member = (self.next_member + count) % self.size
        return self._batch(members)

    def advance(self, batch: Batch, prediction: Tensor) -> None:
        """Move the samples of a batch one timestep on, by the teacher's prediction; the finished ones start anew.

        Args:
            batch: As `take` gave it.
            prediction: float [B, ...], of both halves together where guided.
        """
        members = batch.members
        self.sample[members] = self._stepped(members, prediction)
        self.position[members] += 1
        finished = members[self.position[members] == self.rows]
        if len(finished):
            self.sample[finished] = self._noise(len(finished))
            self.position[finished] = 0
            for name, value in self._conditioning(len(finished)).items():
                self.conditioning[name][finished] = value

    def sweep(self, batch: int) -> Iterator[tuple[int, list[Batch]]]:
        """Lead all samples once through the whole schedule, and leave them staggered evenly over it.

        Yields:
            The table row (timesteps ascend with it) and its batches of up to `batch` samples; the consumer calls `advance` on each.
        """
        kept = torch.empty_like(self.sample)
        conditioning = {name: value.clone() for name, value in self.conditioning.items()}
        target = torch.arange(self.size) % self.rows if self.size >= self.rows else torch.arange(self.size) * self.rows // self.size
        for position in range(self.rows):
            kept[target == position] = self.sample[target == position]
            yield self.rows - 1 - position, [self._batch(members) for members in torch.split(torch.arange(self.size), batch)]
        self.sample, self.position, self.conditioning = kept, target, conditioning

    def restart(self) -> None:
        """Begin anew: fresh noise and conditioning, every sample at the first timestep."""
        self.position = torch.zeros(self.size, dtype=torch.int64)
        self.next_member = 0
        self.sample = self._noise(self.size)
        self.conditioning = self._conditioning(self.size)

    def state(self) -> dict[str, Tensor]:
        """All that decides what comes next, by name."""
        state = {"sample": self.sample, "position": self.position, "next_member": torch.tensor([self.next_member])}
        state["generator"] = self.generator.get_state()
        return state | {f"conditioning.{name}": value for name, value in self.conditioning.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.sample = state["sample"].to(self.device)
        self.position = state["position"].clone()
        self.next_member = int(state["next_member"])
        self.generator.set_state(state["generator"])
        self.conditioning = {name: state[f"conditioning.{name}"].to(self.device) for name in self.conditioning}

    def _batch(self, members: Tensor) -> Batch:
        timestep = self.schedule.timesteps[self.position[members]].float().to(self.device)
        given = {name: value[members] for name, value in self.conditioning.items()}
        return Batch(members, self.sample[members], timestep, self.conditioner.of(given))

    def _stepped(self, members: Tensor, prediction: Tensor) -> Tensor:
        noise = self._noise(len(members)) if self.eta else torch.zeros_like(self.sample[members])
        return self.schedule.previous(self.sample[members], prediction.float(), self.position[members], noise, self.eta)

    def _noise(self, count: int) -> Tensor:
        return torch.randn(count, *self.shape, generator=self.generator).to(self.device)

    def _conditioning(self, count: int) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in self.conditioner.draw(count, self.generator).items()}
