"""Base of the recipes that train on the teacher's prediction: common settings and the learning-rate schedule."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from calibration.recipes.mse import LeastSquares
from calibration.run.dtypes import ComputeDtype, check_dtype
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student
from calibration.training.distillation import Decay, TrainingSchedule
from calibration.training.param_group import ParamGroup
from edm_deploy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class DistillationRecipe(LeastSquares):
    """Starts from the MSE calibration. Adam with decay of the rates to 0 and no weight decay.

    Attributes:
        steps: Training steps.
        batch: Samples per step.
        scale_rate: Relative rate of the activation scales.
        bound_rate: Rate of the activation bounds, in codes.
        warmup: Share of the steps in which the rates rise linearly from 0. Source: none.
        relative: Power of the teacher's mean square that each sample's loss is divided by; 1 is the relative error. Source: 0.
        step_weighting: Power of each sampling step's effect on the final sample that the loss at this step is multiplied by; 0 weights all steps alike,
            1 by their whole effect. Source: 0. At W4A4, `efficientdm` on the reference model, 240 steps, 16 images of each of three seeds, the mean PSNR is
            27.2 dB at 0, 27.9 dB at 0.5 and at 0.75, higher on every seed.
        decay: Decay of the rates over the training: `linear`, or half a `cosine`. Source: linear.
        scale_rates_to: Number of steps that the rates are meant for. With n steps, under a budget as many as are expected from the time of those done, all
            rates are multiplied by `(scale_rates_to / n)^0.5`, so that a longer training has lower ones. 0 leaves them as they are. Source: none; Adam moves a
            parameter by about its rate per step, and n steps of random sign by n^0.5 rates.
        ema: Decay per step, 0 to 1, of an exponential moving average of everything that is trained; the average replaces it at the end. In step i it is at
            most (1 + i) / (10 + i). 0 is no average. Source: none.
        compute: Dtype in which the student computes. Weights, scales, rounding and updates are always float32.
    """

    trains = True
    distills = True
    starts_from_artifact = True
    weight_bits: int = 4
    act_bits: int = 4
    bias_correction: bool = False
    steps: int = 16000
    batch: int = 4
    scale_rate: float = 5e-4
    bound_rate: float = 5e-4
    warmup: float = 0.0
    relative: float = 0.0
    step_weighting: float = 0.5
    decay: Decay = "linear"
    scale_rates_to: int = 0
    ema: float = 0.0
    compute: ComputeDtype = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("scale_rate", "bound_rate", "relative", "step_weighting"):
            at_least(name, getattr(self, name), 0.0)
        within("warmup", self.warmup, 0.0, 1.0)
        at_least("scale_rates_to", self.scale_rates_to, 0)
        if not 0 <= self.ema < 1:
            raise InputError(f"ema is {self.ema}; expected 0 to below 1. Set another ema.")
        if self.decay not in get_args(Decay):
            raise InputError(f"decay is {self.decay!r}; expected {' or '.join(get_args(Decay))}. Set another decay.")
        check_dtype("compute", self.compute)

    def pool_size(self) -> int:
        """At least the batch size."""
        return max(self.calibration_samples, self.batch)

    @property
    def schedule(self) -> TrainingSchedule:
        """Steps, batch and learning-rate schedule."""
        return TrainingSchedule(
            steps=self.steps,
            batch=self.batch,
            warmup=self.warmup,
            relative=self.relative,
            step_weighting=self.step_weighting,
            decay=self.decay,
            scale_rates_to=self.scale_rates_to,
            ema=self.ema,
        )

    def table_groups(self, student: Student) -> list[ParamGroup]:
        """Scales and bounds of every activation table, with their rates. A rate of 0 keeps its parameters fixed."""
        quantizers = student.quantizers.values()
        return [
            ParamGroup([quantizer.log_scale for quantizer in quantizers], self.scale_rate),
            ParamGroup([quantizer.qmin for quantizer in quantizers if quantizer.qmin.requires_grad], self.bound_rate),
        ]
