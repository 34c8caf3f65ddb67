"""Activation samples of one layer at one timestep row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationSamples:
    """Values of one site's input at one row.

    Attributes:
        values: float32 [N], a random subset of all values.
        low: Minimum of all values.
        high: Maximum of all values.
    """

    values: Tensor
    low: float
    high: float

    def __add__(self, other: ActivationSamples) -> ActivationSamples:
        """Values of both rows together."""
        return ActivationSamples(torch.cat([self.values, other.values]), min(self.low, other.low), max(self.high, other.high))

    def subsample(self, factor: int, generator: torch.Generator) -> ActivationSamples:
        """A random `1 / factor` of the values, rounded up; minimum and maximum stay those of all values."""
        count = -(-len(self.values) // factor)
        return ActivationSamples(self.values[torch.randint(len(self.values), (count,), generator=generator)], self.low, self.high)
