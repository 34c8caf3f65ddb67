"""Min-max: ranges that clip nothing that was observed. The plain baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibration.observe import Observation
from calibration.ranges import range_between, widest_weight_scale
from calibration.recipe import Range, Recipe, SiteSpec


@dataclass(frozen=True, kw_only=True)
class MinMax(Recipe):
    """No settings of its own."""

    name = "minmax"

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """The scale that clips no weight."""
        return widest_weight_scale(weight, bits)

    def activation_range(self, observed: Observation, spec: SiteSpec) -> Range:
        """From the smallest to the largest value."""
        return range_between(observed.low, observed.high, spec)


RECIPE = MinMax
