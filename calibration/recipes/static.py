"""Static: one scale per layer for all timesteps, what a quantizer that knows no timestep ships. A baseline.

Source: NVIDIA ModelOpt, modelopt/torch/quantization/config.py, INT8_DEFAULT_CFG with `algorithm: "max"`: weights by the largest magnitude of each output
channel (axis 0), inputs by the largest magnitude of the tensor (axis None), both symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from calibration.data.observation import ActivationSamples
from calibration.observers.scale_search import least_error_weight_scale, least_squares_range, range_between, widest_weight_scale
from calibration.recipes._calibrating import CalibrationRecipe
from calibration.student.quantization_spec import LayerSpec, QuantRange
from edm_deploy.errors import InputError

Calibrator = Literal["max", "mse"]
CALIBRATORS = get_args(Calibrator)


@dataclass(frozen=True, kw_only=True)
class Static(CalibrationRecipe):
    """Every row of a table is the same.

    First and last layers stay W8A8, as in every recipe here; ModelOpt's example for diffusion models leaves some of them in floating point.

    Attributes:
        symmetric: Source: ModelOpt, which has no zero-points by default.
        calibrator: Of weights and inputs: `max` clips nothing; `mse` has the least rounding error, and differs from the recipe `mse`
            by nothing but the timesteps where symmetric is false. Source: max.
    """

    name = "static"
    symmetric: bool = True
    calibrator: Calibrator = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.calibrator not in CALIBRATORS:
            raise InputError(f"calibrator is {self.calibrator!r}; expected {' or '.join(CALIBRATORS)}. Set another calibrator.")

    @property
    def static(self) -> bool:
        """Yes."""
        return True

    @property
    def corrects_bias(self) -> bool:
        """With the calibrator that does so elsewhere."""
        return self.calibrator == "mse"

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """By the calibrator."""
        return widest_weight_scale(weight, bits) if self.calibrator == "max" else least_error_weight_scale(weight, bits)

    def activation_range(self, observed: ActivationSamples, spec: LayerSpec) -> QuantRange:
        """By the calibrator, of what was observed at all rows."""
        if self.calibrator == "max":
            return range_between(observed.low, observed.high, spec)
        return least_squares_range(observed.values, observed.low, observed.high, spec)


RECIPE = Static
