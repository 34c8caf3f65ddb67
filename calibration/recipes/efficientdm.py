"""EfficientDM: low-rank updates merged before rounding, scale tables learned per timestep, rates that follow the weight scale, no data.

Source: He et al., EfficientDM, ICLR 2024, arXiv 2310.03270; constants from the released code, github.com/ThisisBillhe/EfficientDM at 293e212.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.data.trajectory_pool import Trajectories
from calibration.recipes._distilling import DistillationRecipe
from calibration.run.options import Run
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher
from calibration.training import distillation
from calibration.training.param_group import ParamGroup


@dataclass(frozen=True, kw_only=True)
class EfficientDM(DistillationRecipe):
    """Low-rank updates, weight scales and tables are learned together.

    Unlike the released code: bounds are integers while training, no weight decay (it shrank every row of every table), one parameter a scale, rows
    looked up by timestep; the update is added to the float weight, as the paper has it, not to the rounded one.

    Attributes:
        eta: Source: 1.0.
        steps: Training steps. Source: 160 epochs of 100.
        batch: Samples a step. Source: 2 samples with and without their label.
        rank: Of the low-rank update. Source: 32.
        update_rate: Rate of the update in units of its layer's mean weight scale. Source: 1 / 2500.
        weight_scale_rate: Relative rate of the weight scales. Source: 1e-6 absolute, about this much of a usual scale of 0.01.
        scale_rate: Relative rate of the activation scales. Source: 5e-4, absolute there.
        bound_rate: Rate of the activation bounds, in codes. Source: 5e-4.
    """

    name = "efficientdm"
    eta: float = 1.0
    rank: int = 32
    update_rate: float = 1 / 2500
    weight_scale_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)
        for name in ("update_rate", "weight_scale_rate"):
            at_least(name, getattr(self, name), 0.0)

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Calibrate, unless a checkpoint is resumed, then train."""
        self.prepare(student, teacher, trajectories, run)
        distillation.distill(student, teacher, trajectories, self.groups(student), self.schedule, run)

    def prepare(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """All that comes before the first step: updates of zero, and the calibration, unless a checkpoint will bring a later one."""
        generator = torch.Generator().manual_seed(self.seed)
        for layer in student.layers.values():
            layer.add_update(self.rank, generator)
        if not run.options.resume:
            super().fit(student, teacher, trajectories, run)
        student.compute_dtype = DTYPES[self.compute]

    def groups(self, student: Student) -> list[ParamGroup]:
        """What is learned, and how fast. Rates of zero leave their parameters alone."""
        groups = []
        for layer in student.layers.values():
            update = [parameter for parameter in (layer.lora_a, layer.lora_b) if parameter is not None]
            groups.append(ParamGroup(update, self.update_rate * float(layer.log_weight_scale.detach().exp().mean())))
        groups.append(ParamGroup([layer.log_weight_scale for layer in student.layers.values()], self.weight_scale_rate))
        return groups + self.table_groups(student)


RECIPE = EfficientDM
