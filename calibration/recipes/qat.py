"""Quantization-aware training of all weights and biases of the quantized layers and of all scales: the baseline of low-rank updates.

Source: the straight-through estimator of Jacob et al., arXiv 1712.05877; learned scales of LSQ, Esser et al., arXiv 1902.08153. The target is EfficientDM's,
arXiv 2310.03270: the float model's prediction, without data.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibration.recipe import TrainingContext
from calibration.recipes._distilling import DistillationRecipe
from calibration.run.dtypes import DTYPES
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.training.distillation import distill
from calibration.training.param_group import ParamGroup
from calibration.training.trainable_weights import detach_bias, detach_weight, mean_scale


@dataclass(frozen=True, kw_only=True)
class QAT(DistillationRecipe):
    """Weights and biases are trained directly, together with all that EfficientDM trains besides its updates.

    Attributes:
        eta: As EfficientDM.
        weight_rate: Rate of weights and biases in units of their layer's mean weight scale. Chosen so that weights move about as far per step as by
            EfficientDM's update of rank 32 at its published rate.
        weight_scale_rate: Relative rate of the weight scales. As EfficientDM.
    """

    name = "qat"
    eta: float = 1.0
    weight_rate: float = 5e-5
    weight_scale_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_rate", "weight_scale_rate"):
            at_least(name, getattr(self, name), 0.0)

    def fit(self, context: TrainingContext) -> None:
        """Calibrate, unless a checkpoint is resumed, then train."""
        if not context.run.options.resume:
            super().fit(context)
        context.student.compute_dtype = DTYPES[self.compute]
        distill(context, self.groups(context.student), self.schedule)

    def groups(self, student: Student) -> list[ParamGroup]:
        """Trained parameters and their rates; weights and biases are detached from the teacher's. A rate of 0 keeps its parameters fixed."""
        groups = []
        for layer in student.layers.values():
            parameters = [parameter for parameter in (detach_weight(layer), detach_bias(layer)) if parameter is not None]
            groups.append(ParamGroup(parameters, self.weight_rate * mean_scale(layer)))
        groups.append(ParamGroup([layer.log_weight_scale for layer in student.layers.values()], self.weight_scale_rate))
        return groups + self.table_groups(student)


RECIPE = QAT
