"""MSE: ranges with the least squared rounding error. The default of `calibrate`, and the start of training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from calibration.data.observation import ActivationSamples
from calibration.observers.calibrate import CalibrationRecipe
from calibration.observers.scale_search import least_error_weight_scale, least_squares_range
from calibration.run.setting_checks import at_least
from calibration.student.quantization_spec import LayerSpec, QuantRange


@dataclass(frozen=True, kw_only=True)
class LeastSquares(CalibrationRecipe):
    """Searches scale and lowest code jointly: the base of all recipes that start from these ranges.

    Attributes:
        weight_exponent: Exponent of the weights' rounding error. Source: 2.4, EfficientDM's and Q-Diffusion's released code.
        clip_weight: Factor of the squared error of clipped values of feature maps; of tokens it is 1. Rounding errors have both signs and partly cancel in a
            layer's sum; those of clipping have one. Source: none, 1. On the reference model at W4A4, training and GPTQ gain nothing from 4; a rotated tiny DiT
            loses by it.
        bias_correction: Whether biases are corrected for the mean output error of weight rounding.
    """

    weight_exponent: float = 2.4
    clip_weight: float = 1.0
    bias_correction: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_exponent", "clip_weight"):
            at_least(name, getattr(self, name), 1.0)

    @property
    def corrects_bias(self) -> bool:
        """Whether bias correction is enabled."""
        return self.bias_correction

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """The scale with the least rounding error, with exponent `weight_exponent`."""
        return least_error_weight_scale(weight, bits, exponent=self.weight_exponent)

    def activation_range(self, observed: ActivationSamples, spec: LayerSpec) -> QuantRange:
        """The range with the least squared error, over scale and lowest code jointly."""
        weight = self.clip_weight if observed.feature_map else 1.0
        # Exponent 2, not 2.4: a layer propagates the squared error of its input.
        return least_squares_range(observed.values, observed.low, observed.high, spec, clip_weight=weight)


@dataclass(frozen=True, kw_only=True)
class Mse(LeastSquares):
    """These ranges alone.

    Attributes:
        clip_weight: As above. By measurement 4: on the reference model at W4A4 25.8 dB, with 1 24.8, with 12 25.5; at 8 bits it changes nothing.
    """

    name = "mse"
    clip_weight: float = 4.0


RECIPE = Mse
