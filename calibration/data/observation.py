"""Activation samples of one layer at one timestep row, and the share of a batch that they were observed on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """The samples `start` to `start + count` of a batch of `total`, which one of several processes computes.

    Attributes:
        start: The first of them.
        count: Number of them, 1 or more.
        total: Samples of the batch in all processes together.
        halves: 2 under classifier-free guidance, where the network runs on two samples for each; else 1.
    """

    start: int
    count: int
    total: int
    halves: int = 1

    def size(self, values: int) -> int:
        """Number of values of a layer's input in the whole batch, of which the share has `values`."""
        return values // self.count * self.total

    def place(self, flat: Tensor, positions: Tensor) -> Tensor:
        """The values at some positions of the whole batch's input, 0 where they are not of this share, so that the sum over all shares has all.

        Args:
            flat: float [N], the share's input, samples first; the first half of each guided sample before the second.
            positions: int64 [P], each below `size(N)`.

        Returns:
            float [P].
        """
        each = len(flat) // (self.halves * self.count)  # values of one sample
        half, member, offset = positions // (self.total * each), positions // each % self.total - self.start, positions % each
        own = (member >= 0) & (member < self.count)
        found = flat[torch.where(own, (half * self.count + member) * each + offset, 0).to(flat.device)]
        return torch.where(own.to(flat.device), found, 0)


@dataclass(frozen=True)
class ActivationSamples:
    """Values of one site's input at one row.

    Attributes:
        values: float32 [N], a random subset of all values.
        low: Minimum of all values.
        high: Maximum of all values.
        feature_map: Whether they are of feature maps, [B, C, H, W], and not of tokens or embeddings.
    """

    values: Tensor
    low: float
    high: float
    feature_map: bool = False

    def __add__(self, other: ActivationSamples) -> ActivationSamples:
        """Values of both rows together."""
        low, high = min(self.low, other.low), max(self.high, other.high)
        return replace(self, values=torch.cat([self.values, other.values]), low=low, high=high)

    def subsample(self, factor: int, generator: torch.Generator) -> ActivationSamples:
        """A random `1 / factor` of the values, rounded up; minimum and maximum stay those of all values."""
        count = -(-len(self.values) // factor)
        return replace(self, values=self.values[torch.randint(len(self.values), (count,), generator=generator)])
