"""Forward pre-hooks that collect statistics of the inputs of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples

SAMPLES_PER_BATCH = 1 << 14  # values kept of each site's input per batch: enough for percentiles, sorted in a millisecond


class Observer:
    """Forward pre-hook that collects a random subset of one site's input over the batches of one row, and its minimum and maximum including 0."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.parts: list[Tensor] = []
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Observe one batch; a pre-hook receives the layer and its arguments."""
        x = args[0]
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        flat = x.reshape(-1) if x.is_contiguous() else x.permute(0, *range(2, x.ndim), 1).reshape(-1)
        if flat.numel() > SAMPLES_PER_BATCH:
            flat = flat[torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=self.generator).to(flat.device)]
        self.parts.append(flat.float().cpu())

    def samples(self) -> ActivationSamples:
        """The samples collected so far."""
        return ActivationSamples(torch.cat(self.parts), self.low, self.high)

    def clear(self) -> None:
        """Forget the samples collected so far."""
        self.parts, self.low, self.high = [], 0.0, 0.0

    def pop(self) -> ActivationSamples:
        """The samples collected so far; resets the observer."""
        samples = self.samples()
        self.clear()
        return samples


class MinMaxObserver:
    """Forward pre-hook that records the minimum and maximum of one site's input, including 0."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Observe one batch; a pre-hook receives the layer and its arguments."""
        low, high = torch.aminmax(args[0])
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def pop(self) -> tuple[float, float]:
        """Minimum and maximum so far; resets the observer."""
        extremes = self.low, self.high
        self.low, self.high = 0.0, 0.0
        return extremes


class InputMean:
    """Forward pre-hook that averages each input channel over all batches of all rows; batches have equal weight."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.batches = 0

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Observe one batch; a pre-hook receives the layer and its arguments."""
        x = args[0]
        channel = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        mean = x.mean(dim=[axis for axis in range(x.ndim) if axis != channel])
        self.total = mean if self.total is None else self.total + mean
        self.batches += 1

    def value(self) -> Tensor:
        """Mean of each input channel, float32 [Cin]."""
        assert self.total is not None  # every site runs in every forward pass
        return self.total / self.batches
