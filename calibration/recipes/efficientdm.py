"""EfficientDM: low-rank updates merged before rounding, scale tables learned by timestep, learning rates proportional to the weight scale, no data.

Source: He et al., EfficientDM, ICLR 2024, arXiv 2310.03270; constants from the released code, github.com/ThisisBillhe/EfficientDM at 293e212.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calibration.recipe import TrainingContext
from calibration.recipes._distilling import DistillationRecipe
from calibration.run.dtypes import DTYPES
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.training.distillation import distill
from calibration.training.param_group import ParamGroup
from calibration.training.trainable_weights import mean_scale
from edm_deploy.errors import InputError
from edm_deploy.network.low_rank_branch import largest_rank, unbranchable
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.pipelines.source import Source


@dataclass(frozen=True, kw_only=True)
class EfficientDM(DistillationRecipe):
    """Low-rank updates, weight scales and activation tables are trained jointly.

    Deviations from the released code: bounds are integers during training; no weight decay (it shrank every row of every table); one parameter per
    scale; rows are looked up by timestep; the update is added to the float weight, as in the paper, not to the rounded one; weights are symmetric, with one
    scale per output channel and no zero-point; each row of a table starts from the range calibrated at its own timestep, not from a copy of one range. Which
    layers keep 8 bits is the model family's decision; the released code does not quantize shortcuts and samplers (`skip`, `op`) at all.

    Attributes:
        eta: Source: 1.0.
        steps: Training steps. Source: 160 epochs of 100.
        batch: Samples per step. Source: 2 samples with and without their label.
        rank: Rank of the low-rank update. Source: 32.
        keep_branch: Whether the update of a layer at the recipe's bits stays a float branch on the layer's input, rounded to float16, instead of being
            merged before rounding. Then it can correct less than one step of a weight, at the cost of two thin products in floating point.
            Source: it is merged.
        update_rate: Rate of the update in units of its layer's mean weight scale. Source: 1 / 2500.
        weight_scale_rate: Relative rate of the weight scales. Source: 1e-6 absolute, about this relative to a usual scale of 0.01.
        scale_rate: Relative rate of the activation scales. Source: 5e-4, absolute.
        bound_rate: Rate of the activation bounds, in codes. Source: 5e-4.
    """

    name = "efficientdm"
    eta: float = 1.0
    rank: int = 32
    keep_branch: bool = False
    update_rate: float = 1 / 2500
    weight_scale_rate: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 1)
        for name in ("update_rate", "weight_scale_rate"):
            at_least(name, getattr(self, name), 0.0)

    def structure(self, source: Source) -> NetworkRewrite:
        """A branch for each layer at the recipe's bits, where updates stay branches."""
        if not self.keep_branch:
            return super().structure(source)
        family = source.family_object
        layers = {name: layer for name, layer in family.sites(source.model).items() if family.placement(name) == "quantize"}
        usable = {name: layer for name, layer in layers.items() if unbranchable(layer, 1) is None}
        return NetworkRewrite(branches={name: min(self.rank, largest_rank(layer)) for name, layer in usable.items()})

    def fit(self, context: TrainingContext) -> None:
        """Calibrate, unless a checkpoint is resumed, then train."""
        self.prepare(context)
        distill(context, self.groups(context.student), self.schedule)

    def prepare(self, context: TrainingContext) -> None:
        """Add updates that are zero initially, and calibrate, unless the state of a checkpoint will be loaded.

        Raises:
            InputError: The rank exceeds that of every layer.
        """
        # Above the default: models with narrow layers only, where a smaller rank is the full one.
        full = max(min(len(layer.layer.weight), layer.layer.weight[0].numel()) for layer in context.student.layers.values())
        if self.rank > max(full, type(self).rank):
            raise InputError(f"rank is {self.rank}; the largest that a layer of this model can use is {full}. Set rank to {full} or less.")
        generator = torch.Generator().manual_seed(self.seed)
        for name, layer in context.student.layers.items():
            if (branch := context.student.branch_of(name)) is None:
                layer.add_update(self.rank, generator)
            elif not bool(branch.up.weight.any()):
                branch.start(generator)
        if not context.run.options.resume:
            super().fit(context)
        context.student.compute_dtype = DTYPES[self.compute]

    def groups(self, student: Student) -> list[ParamGroup]:
        """Trained parameters and their rates. A rate of 0 keeps its parameters fixed."""
        groups = []
        for name, layer in student.layers.items():
            branch = student.branch_of(name)
            update = [parameter for parameter in (layer.lora_a, layer.lora_b) if parameter is not None]
            update += [] if branch is None else branch.parameters()
            groups.append(ParamGroup(update, self.update_rate * mean_scale(layer)))
        groups.append(ParamGroup([layer.log_weight_scale for layer in student.layers.values()], self.weight_scale_rate))
        return groups + self.table_groups(student)


RECIPE = EfficientDM
