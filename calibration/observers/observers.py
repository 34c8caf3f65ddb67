"""Forward pre-hooks that collect statistics of the inputs of layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples, Share
from calibration.run.processes import SINGLE, Processes

SAMPLES_PER_BATCH = 1 << 14  # values kept of each site's input per batch: enough for percentiles, sorted in a millisecond


class Observer:
    """Forward pre-hook that collects a random subset of one site's input over the batches of one row, and its minimum and maximum including 0.

    Attributes:
        share: What the observed batch is of the batch of all processes; None if it is the whole. With a share, the subset is that of the whole batch, with 0
            for values of other processes: the sum over all has every value. `merged` forms it.
        feature_map: Whether the input is a feature map, [B, C, H, W].
    """

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.share: Share | None = None
        self.parts: list[Tensor] = []
        self.feature_map = False
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Observe one batch; a pre-hook receives the layer and its arguments."""
        x = args[0]
        low, high = torch.aminmax(x)
        self.low, self.high, self.feature_map = min(self.low, float(low)), max(self.high, float(high)), x.ndim == 4
        flat = x.reshape(-1) if x.is_contiguous() else x.permute(0, *range(2, x.ndim), 1).reshape(-1)
        size = flat.numel() if self.share is None else self.share.size(flat.numel())
        positions = torch.randint(size, (SAMPLES_PER_BATCH,), generator=self.generator) if size > SAMPLES_PER_BATCH else None
        if self.share is not None:
            flat = self.share.place(flat, torch.arange(size) if positions is None else positions)
        elif positions is not None:
            flat = flat[positions.to(flat.device)]
        self.parts.append(flat.float().cpu())

    def samples(self) -> ActivationSamples:
        """The samples collected so far."""
        return ActivationSamples(torch.cat(self.parts), self.low, self.high, self.feature_map)

    def clear(self) -> None:
        """Forget the samples collected so far."""
        self.parts, self.low, self.high = [], 0.0, 0.0

    def pop(self) -> ActivationSamples:
        """The samples collected so far; resets the observer."""
        samples = self.samples()
        self.clear()
        return samples


def merged(found: Mapping[str, ActivationSamples], processes: Processes) -> Mapping[str, ActivationSamples]:
    """The samples of all processes together, by site: those that one process would have observed on the whole batch.

    Args:
        found: What this process observed with its shares; the values are replaced in place.
        processes: Those of the run; a single one has all samples already.
    """
    if processes.size == 1:
        return found
    processes.add([samples.values for samples in found.values()])
    extremes = processes.smallest(torch.tensor([(samples.low, -samples.high) for samples in found.values()], dtype=torch.float64)).tolist()
    return {name: replace(found[name], low=low, high=-high) for name, (low, high) in zip(found, extremes, strict=True)}


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
    """Forward pre-hook that averages each input channel over all batches of all rows; batches have equal weight.

    Attributes:
        share: What the observed batch is of the batch of all processes; None if it is the whole.
    """

    def __init__(self) -> None:
        self.share: Share | None = None
        self.total: Tensor | None = None
        self.batches = 0

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Observe one batch; a pre-hook receives the layer and its arguments."""
        x = args[0]
        channel = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        mean = x.mean(dim=[axis for axis in range(x.ndim) if axis != channel])
        if self.share is not None:
            mean = mean * (self.share.count / self.share.total)
        self.total = mean if self.total is None else self.total + mean
        self.batches += 1

    def value(self, processes: Processes = SINGLE) -> Tensor:
        """Mean of each input channel over the batches of all processes, float32 [Cin]."""
        assert self.total is not None  # every site runs in every forward pass
        processes.add([self.total])
        return self.total / self.batches
