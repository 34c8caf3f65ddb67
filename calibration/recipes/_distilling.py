"""What the recipes that train against the teacher's prediction have in common: their settings, and how rates change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calibration.recipes.mse import Mse
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.student.teacher import DTYPES
from calibration.training import distillation
from calibration.training.param_group import ParamGroup


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(Mse):
    """Starts from the MSE calibration. Rates fall linearly to 0; nothing decays.

    Attributes:
        steps: Training steps.
        batch: Samples a step.
        scale_rate: Relative rate of the activation scales.
        bound_rate: Rate of the activation bounds, in codes.
        warmup: Share of the steps in which the rates rise from 0. Source: none.
        relative: Power of the teacher's mean square that each sample's loss is divided by; 1 counts relative errors. Source: 0.
        compute: What the student computes in. Its weights, scales, rounding and updates are float32 always.
    """

    trains = True
    weight_bits: int = 4
    act_bits: int = 4
    bias_correction: bool = False
    steps: int = 16000
    batch: int = 4
    scale_rate: float = 5e-4
    bound_rate: float = 5e-4
    warmup: float = 0.0
    relative: float = 0.0
    compute: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("scale_rate", "bound_rate", "warmup", "relative"):
            at_least(name, getattr(self, name), 0.0)
        if self.compute not in DTYPES:
            distillation.refuse_compute(self.compute)

    def pool_size(self) -> int:
        """Enough for a batch."""
        return max(self.calibration_samples, self.batch)

    @property
    def schedule(self) -> distillation.TrainingSchedule:
        """Steps, batch and how rates change over them."""
        return distillation.TrainingSchedule(self.steps, self.batch, self.warmup, self.relative)

    def table_groups(self, student: Student) -> list[ParamGroup]:
        """Every table's scales and bounds, with their rates. Rates of zero leave their parameters alone."""
        quantizers = student.quantizers.values()
        return [
            ParamGroup([quantizer.log_scale for quantizer in quantizers], self.scale_rate),
            ParamGroup([quantizer.qmin for quantizer in quantizers if quantizer.qmin.requires_grad], self.bound_rate),
        ]
