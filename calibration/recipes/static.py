"""Static: one scale per layer for all timesteps, as in a quantizer without timestep dependence. A baseline.

Source: NVIDIA ModelOpt, modelopt/torch/quantization/config.py, INT8_DEFAULT_CFG with `algorithm: "max"`: weights by the largest magnitude of each output
channel (axis 0), inputs by the largest magnitude of the tensor (axis None), both symmetric.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from calibration.data.observation import ActivationSamples
from calibration.observers.calibrate import CalibrationRecipe
from calibration.observers.scale_search import least_error_weight_scale, least_squares_range, range_between, widest_weight_scale
from calibration.student.quantization_spec import LayerSpec, QuantRange
from edm_deploy.errors import InputError

Calibrator = Literal["max", "mse"]
CALIBRATORS = get_args(Calibrator)


@dataclass(frozen=True, kw_only=True)
class Static(CalibrationRecipe):
    """All rows of a table are equal.

    First and last layers stay W8A8, as in every recipe here; ModelOpt's example for diffusion models leaves some of them in floating point.

    Attributes:
        symmetric: Source: ModelOpt, which has no zero-points by default.
        calibrator: For weights and inputs: `max` clips nothing; `mse` has the least rounding error, and with `symmetric` false differs from the recipe
            `mse` only in being static. Source: max.
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
        """Always true: one range for all timesteps."""
        return True

    @property
    def corrects_bias(self) -> bool:
        """Whether the calibrator is `mse`, as in the recipe `mse`."""
        return self.calibrator == "mse"

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """The scale according to the calibrator."""
        return widest_weight_scale(weight, bits) if self.calibrator == "max" else least_error_weight_scale(weight, bits)

    def activation_range(self, observed: ActivationSamples, spec: LayerSpec) -> QuantRange:
        """The range according to the calibrator, from the samples of all rows."""
        if self.calibrator == "max":
            return range_between(observed.low, observed.high, spec)
        return least_squares_range(observed.values, observed.low, observed.high, spec)


RECIPE = Static
