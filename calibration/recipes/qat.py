"""Quantization-aware training of every weight and bias of the quantized layers, and of all scales: what a low-rank update is measured against.

Source: the straight-through estimator of Jacob et al., arXiv 1712.05877; learned scales of LSQ, Esser et al., arXiv 1902.08153. The target is EfficientDM's,
arXiv 2310.03270: the float model's prediction, without data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from calibration import distill
from calibration.recipe import Run, at_least
from calibration.recipes.mse import Mse
from calibration.student import DTYPES, Student, Teacher
from calibration.trajectories import Trajectories
from calibration.weights import mean_scale, own_bias, own_weight


@dataclass(frozen=True, kw_only=True)
class QAT(Mse):
    """Starts from the MSE calibration; Adam; rates fall linearly to 0.

    Attributes:
        eta: As EfficientDM.
        steps: Training steps. As EfficientDM.
        batch: Samples a step. As EfficientDM.
        weight_rate: Rate of weights and biases in units of their layer's mean weight scale. Chosen so that the weights move about as far a step as by
            EfficientDM's update of rank 32 at its published rate.
        weight_scale_rate: Relative rate of the weight scales. As EfficientDM.
        scale_rate: Relative rate of the activation scales. As EfficientDM.
        bound_rate: Rate of the activation bounds, in codes. As EfficientDM.
        warmup: Share of the steps in which the rates rise from 0.
        relative: Power of the teacher's mean square that each sample's loss is divided by.
        compute: What the student computes in. Its weights, scales and rounding are float32 always.
    """

    name = "qat"
    weight_bits: int = 4
    act_bits: int = 4
    bias_correction: bool = False
    eta: float = 1.0
    steps: int = 16000
    batch: int = 4
    weight_rate: float = 5e-5
    weight_scale_rate: float = 1e-4
    scale_rate: float = 5e-4
    bound_rate: float = 5e-4
    warmup: float = 0.0
    relative: float = 0.0
    compute: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("weight_rate", "weight_scale_rate", "scale_rate", "bound_rate", "warmup", "relative"):
            at_least(name, getattr(self, name), 0.0)
        if self.compute not in DTYPES:
            distill.refuse_compute(self.compute)

    def pool_size(self) -> int:
        """Enough for a batch."""
        return max(self.calibration_samples, self.batch)

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Calibrate, unless a checkpoint is resumed, then train."""
        if not run.options.resume:
            super().fit(student, teacher, trajectories, run)
        student.compute_dtype = DTYPES[self.compute]
        schedule = distill.Schedule(self.steps, self.batch, self.warmup, self.relative)
        distill.distill(student, teacher, trajectories, self.groups(student), schedule, run)

    def groups(self, student: Student) -> list[distill.Group]:
        """What is learned, weights and biases as parameters of the student's own, and how fast. Rates of zero leave theirs alone."""
        groups = []
        for layer in student.layers.values():
            own = [parameter for parameter in (own_weight(layer), own_bias(layer)) if parameter is not None]
            groups.append(distill.Group(own, self.weight_rate * mean_scale(layer)))
        quantizers = student.quantizers.values()
        groups.append(distill.Group([layer.log_weight_scale for layer in student.layers.values()], self.weight_scale_rate))
        groups.append(distill.Group([quantizer.log_scale for quantizer in quantizers], self.scale_rate))
        groups.append(distill.Group([quantizer.qmin for quantizer in quantizers if quantizer.qmin.requires_grad], self.bound_rate))
        return groups


RECIPE = QAT
