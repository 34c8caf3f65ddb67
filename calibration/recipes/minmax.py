"""Min-max: ranges that clip no observed value. The simplest baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibration.data.observation import ActivationSamples
from calibration.observers.calibrate import CalibrationRecipe
from calibration.observers.scale_search import range_between, widest_weight_scale
from calibration.student.quantization_spec import LayerSpec, QuantRange


@dataclass(frozen=True, kw_only=True)
class MinMax(CalibrationRecipe):
    """Has only the settings of every recipe."""

    name = "minmax"

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """The scale that clips no weight."""
        return widest_weight_scale(weight, bits)

    def activation_range(self, observed: ActivationSamples, spec: LayerSpec) -> QuantRange:
        """From the minimum to the maximum."""
        return range_between(observed.low, observed.high, spec)


RECIPE = MinMax
