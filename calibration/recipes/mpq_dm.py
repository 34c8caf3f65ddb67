"""MPQ-DM: inputs smoothed, bits moved to output channels with outliers, EfficientDM's training, relations of the last features distilled.

Source: Feng et al., MPQ-DM, AAAI 2025, arXiv 2412.11549; constants from the released code, github.com/cantbebetter2/MPQ-DM at 2b05dd7.
Version 2: arXiv 2507.04290, without released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calibration.data.trajectory_pool import Trajectories
from calibration.observers.channel_scaling import channel_ranges, scalable, set_pre_scales, stacked_weight
from calibration.observers.mixed_precision import kurtosis, mix_channel_bits, top_share
from calibration.recipes.efficientdm import EfficientDM
from calibration.reconstruction.blocks import blocks_of
from calibration.run.options import Run
from calibration.run.setting_checks import at_least, within
from calibration.student.layers import StudentLayer
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher
from calibration.training import distillation
from calibration.training.binary_residual import FIRST_BITS, BinaryResidual, commit
from calibration.training.losses import RelationDistillationLoss
from edm_deploy.errors import InputError
from edm_deploy.network.family import meta_model

UpdateInit = Literal["zero", "error"]


@dataclass(frozen=True, kw_only=True)
class MPQDM(EfficientDM):
    """EfficientDM's settings, and these. One integer convolution a layer still: bits differ by output channel, and int8 storage holds them all.

    Unlike the released code: the relation term has a gradient (there, both feature maps are detached, so it trained nothing); it counts at every step,
    over samples of mixed timesteps, instead of at every second one as a mean over two neighbouring timesteps; weights stay symmetric; smoothing looks
    at all timesteps, not at one batch. At 2 and at 8 bits no channel can have a bit less and another a bit more, so all keep theirs.

    Version 2's binary residual branch is not a second convolution: both terms lie on one grid of int8 codes (`calibration/training/binary_residual.py`), so a layer
    that has it is an INT8 layer. Where 4-bit kernels are what counts, leave it at 0.

    Attributes:
        smoothing: Power of `max|X_c| / max|W_c|` that inputs are divided by. Source: 0.5, SmoothQuant's. 0 leaves them.
        mixed_share: Of each layer's output channels that get a bit more, and as many a bit less, where that lowers its output's error. Source: 0.1.
        relation_weight: Of the divergence of pixel relations. Source: 100.
        residual_share: Of each layer's output channels, those with the heaviest tails, that get a binary residual (version 2). Source: salient
            channels, without their number. 0 is version 1.
        update_init: Where the low-rank update's rows begin: `zero` as EfficientDM has it; `error` along the leading right singular vectors of the
            weight's rounding error (version 2). The update itself begins at zero either way: the float weight that it is added to holds that error.
    """

    name = "mpq-dm"
    rows: int = 20
    eta: float = 0.0
    smoothing: float = 0.5
    mixed_share: float = 0.1
    relation_weight: float = 100.0
    residual_share: float = 0.0
    update_init: UpdateInit = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        within("smoothing", self.smoothing, 0.0, 1.0)
        within("mixed_share", self.mixed_share, 0.0, 0.5)
        within("residual_share", self.residual_share, 0.0, 1.0)
        at_least("relation_weight", self.relation_weight, 0.0)
        if self.update_init not in get_args(UpdateInit):
            raise InputError(
                f"update_init is {self.update_init!r}; expected one of {', '.join(get_args(UpdateInit))}. Set another update_init."
            )

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Smooth, calibrate and mix bits, unless a checkpoint is resumed; then train."""
        if self.smoothing and not run.options.resume:
            self.smooth(student, teacher, trajectories)
        self.prepare(student, teacher, trajectories, run)
        if not run.options.resume:
            student.compute_dtype = torch.float32
            mixed, layers = mix_channel_bits(student, teacher, trajectories, self, self.mixed_share)
            run.notes.update(mixed_layers=mixed, layers=layers)
            if self.update_init == "error":
                for layer in student.layers.values():
                    init_lora_from_error(layer)
            student.compute_dtype = DTYPES[self.compute]
        if self.residual_share:
            self.add_residuals(student)
        terms = [RelationDistillationLoss(last_block(student), self.relation_weight)] if self.relation_weight else []
        distillation.distill(student, teacher, trajectories, self.groups(student), self.schedule, run, terms=terms)
        if self.residual_share:
            run.notes.update(residual_channels=commit(student.layers.values()))

    def add_residuals(self, student: Student) -> None:
        """Give the channels with the heaviest tails a second term; a checkpoint that is resumed brings its own choice of them."""
        for name, layer in student.layers.items():
            if student.family.placement(name) == "quantize" and layer.bits in FIRST_BITS:
                layer.rounding = BinaryResidual(layer, top_share(kurtosis(layer.merged_weight().detach()), self.residual_share))

    def smooth(self, student: Student, teacher: Teacher, trajectories: Trajectories) -> None:
        """Divide the input of every layer by `s_c = (max|X_c| / max|W_c|)^smoothing`; the layers that are fed the same share it."""
        ranges = channel_ranges(student, teacher, trajectories, scalable(student))
        scales = {name: smoothing_scales(seen.amax(), stacked_weight(student, name), self.smoothing) for name, seen in ranges.items()}
        set_pre_scales(student, self, {name: 1 / scale for name, scale in scales.items()})


def smoothing_scales(reached: Tensor, weight: Tensor, power: float) -> Tensor:
    """`(max|X_c| / max|W_c|)^power` in units in which their geometric mean is 1, which no quantizer notices; 1 for channels that are dead.

    Args:
        reached: float32 [Cin], max|X_c|.
        weight: float32 [Cout, Cin, kernel].
        power: 0 to 1.

    Returns:
        float32 [Cin], each > 0.
    """
    largest = weight.abs().amax((0, 2))
    alive = (reached > 0) & (largest > 0)
    logs = torch.where(alive, (reached / largest).log(), 0.0) * power
    mean = logs.sum() / alive.sum().clamp(min=1)
    return torch.where(alive, (logs - mean).exp(), 1.0)


@torch.no_grad()
def init_lora_from_error(layer: StudentLayer) -> None:
    """Turn the rows of A to the directions in which rounding errs most; B stays zero, and A as large as it was."""
    assert layer.lora_a is not None  # added by `prepare`
    error = (layer.merged_weight() - layer.rounded_weight()).flatten(1)
    # Not torch.svd_lowrank: it draws from the global generator.
    rows = torch.linalg.svd(error, full_matrices=False).Vh[: len(layer.lora_a)]
    layer.lora_a.copy_(rows * (layer.lora_a.norm() / rows.norm()))


def last_block(student: Student) -> str:
    """Name of the last block that holds several sites: of a UNet the end of its decoder."""
    outline = meta_model(student.family, student.config, student.structure)
    blocks = blocks_of(student, outline, "block")
    return next((block for block in reversed(blocks) if len(block.sites) > 1), blocks[-1]).modules[-1]


RECIPE = MPQDM
