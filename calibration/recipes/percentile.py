"""Percentile: ranges that clip a fixed share of the observed values at each end."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibration.data.observation import ActivationSamples
from calibration.observers.calibrate import CalibrationRecipe
from calibration.observers.scale_search import range_between, widest_weight_scale
from calibration.run.setting_checks import within
from calibration.student.quantization_spec import LayerSpec, QuantRange


@dataclass(frozen=True, kw_only=True)
class Percentile(CalibrationRecipe):
    """Clips the tails.

    Attributes:
        percentile: Percent of the values within the range. Source: 99.99, the middle of QuEST's three candidates and TensorRT's choice.
    """

    name = "percentile"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        super().__post_init__()
        within("percentile", self.percentile, 50.0, 100.0)

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """The scale that clips no weight."""
        return widest_weight_scale(weight, bits)

    def activation_range(self, observed: ActivationSamples, spec: LayerSpec) -> QuantRange:
        """The range between the two tails."""
        tail = (1 - self.percentile / 100) / 2
        ordered = observed.values.sort().values
        last = len(ordered) - 1
        low, high = (float(ordered[round(share * last)]) for share in (tail, 1 - tail))
        return range_between(low, high, spec)


RECIPE = Percentile
