"""Where inputs come from without data: a pool of samples in flight, each at a timestep of its own, led by the teacher's prediction."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edm_deploy.conditioning import Conditioner, Conditioning
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines import Source
from edm_deploy.quant import per_channel


def calibrated_timesteps(scheduler: Any, rows: int) -> Tensor:  # Any: diffusers' schedulers share no useful base class
    """The timesteps of a `rows`-step sampling on the model's own scheduler, rounded to integers: int32 [R], ascending.

    Raises:
        InputError: More rows than the schedule has timesteps.
    """
    length = int(scheduler.config.num_train_timesteps)
    if rows > length:
        raise InputError(f"rows is {rows}, but the model's schedule has {length} timesteps. Set rows to {length} or fewer.")
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(rows)
    stops = torch.as_tensor(scheduler.timesteps).double().round().clamp(0, length - 1)
    return torch.tensor(sorted({int(stop) for stop in stops}), dtype=torch.int32)


@dataclass(frozen=True)
class NoiseSchedule:
    """The scheduler's arithmetic for samples that stand at different timesteps.

    Attributes:
        timesteps: int64 [R], descending.
        alphas: float64 [R + 1], the cumulated alpha at each timestep; the last is that of the finished sample.
        prediction: What the model predicts: `epsilon`, `v_prediction` or `sample`.
        clip: Bound of the predicted clean sample, or None.
    """

    timesteps: Tensor
    alphas: Tensor
    prediction: str
    clip: float | None

    def previous(self, sample: Tensor, prediction: Tensor, positions: Tensor, noise: Tensor, eta: float) -> Tensor:
        """One DDIM step, each sample at its own position.

        Args:
            sample: float32 [B, C, H, W].
            prediction: float32, the same shape.
            positions: int64 [B], indices into `timesteps`.
            noise: float32, the same shape, standard normal.
            eta: 0 takes no noise, 1 as much as DDPM.

        Returns:
            float32, the same shape: the samples one position further.

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


def noise_schedule(scheduler: Any, timesteps: Tensor) -> NoiseSchedule:  # Any: as above
    """The noise schedule of a diffusers scheduler at `timesteps`, int [R] ascending.

    Raises:
        UnsupportedError: The scheduler has no cumulated alphas (flow matching), or its prediction type is unknown.
    """
    alphas = getattr(scheduler, "alphas_cumprod", None)
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if alphas is None or prediction not in ("epsilon", "v_prediction", "sample"):
        raise UnsupportedError(
            f"{type(scheduler).__name__} with prediction type {prediction!r} has no trajectory here; "
            "expected a diffusion schedule that predicts epsilon, v_prediction or sample."
        )
    descending = timesteps.long().flip(0)
    final = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0)).double().reshape(1)
    clip = float(scheduler.config.get("clip_sample_range", 1.0)) if scheduler.config.get("clip_sample", False) else None
    return NoiseSchedule(descending, torch.cat([alphas.double().cpu()[descending], final]), prediction, clip)


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
        self.schedule = noise_schedule(source.scheduler, timesteps)
        self.shape = source.family_object.walked_shape(source.config)
        self.conditioner = conditioner or Conditioner(source.family_object, source.config)
        self.size, self.eta, self.device = size, eta, device
        self.generator = torch.Generator().manual_seed(seed)
        self.position = torch.zeros(size, dtype=torch.int64)
        self.next_member = 0
        self.sample = self._noise(size)
        self.conditioning = self._conditioning(size)

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
