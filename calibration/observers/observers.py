"""Calibration: what each site is fed at each row of its table, along trajectories, and the range that a recipe makes of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples

SAMPLES_PER_BATCH = 1 << 14  # values kept of each site's input in one batch: enough for percentiles, and sorted in a millisecond


class Observer:
    """Collects one site's input over the batches of one row. A forward pre-hook of the teacher's layer."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.parts: list[Tensor] = []
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Look at one batch; a pre-hook gets the layer and its arguments."""
        x = args[0]
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        flat = x.reshape(-1) if x.is_contiguous() else x.permute(0, *range(2, x.ndim), 1).reshape(-1)
        if flat.numel() > SAMPLES_PER_BATCH:
            flat = flat[torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=self.generator).to(flat.device)]
        self.parts.append(flat.float().cpu())

    def take(self) -> ActivationSamples:
        """The observation so far; the observer starts anew."""
        observation = ActivationSamples(torch.cat(self.parts), self.low, self.high)
        self.parts, self.low, self.high = [], 0.0, 0.0
        return observation


class MinMaxObserver:
    """The smallest and largest of all values that one site was fed, 0 among them. A forward pre-hook of the teacher's layer."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Look at one batch; a pre-hook gets the layer and its arguments."""
        low, high = torch.aminmax(args[0])
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def take(self) -> tuple[float, float]:
        """Both; it starts anew."""
        found = self.low, self.high
        self.low, self.high = 0.0, 0.0
        return found


class InputMean:
    """The mean of each input channel over all batches of all rows. A forward pre-hook of the teacher's layer."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.batches = 0

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Look at one batch; a pre-hook gets the layer and its arguments."""
        x = args[0]
        channel = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        mean = x.mean(dim=[axis for axis in range(x.ndim) if axis != channel])
        self.total = mean if self.total is None else self.total + mean
        self.batches += 1

    def take(self) -> Tensor:
        """float32 [Cin]."""
        assert self.total is not None  # every site is run in every forward
        return self.total / self.batches
