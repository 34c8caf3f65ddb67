"""Activation samples of one layer at one timestep row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ActivationSamples:
    """What one site was fed at one row.

    Attributes:
        values: float32 [N], drawn at random from all values.
        low: The smallest of all values.
        high: The largest.
    """

    values: Tensor
    low: float
    high: float

    def __add__(self, other: ActivationSamples) -> ActivationSamples:
        """What was fed at either row."""
        return ActivationSamples(torch.cat([self.values, other.values]), min(self.low, other.low), max(self.high, other.high))

    def thinned(self, times: int, generator: torch.Generator) -> ActivationSamples:
        """One of so many values, drawn at random; the smallest and the largest are known still."""
        count = -(-len(self.values) // times)
        return ActivationSamples(self.values[torch.randint(len(self.values), (count,), generator=generator)], self.low, self.high)
