"""MPQ-DM: smoothed inputs, bits moved to output channels with outliers, EfficientDM's training, distilled relations of the last features.

Source: Feng et al., MPQ-DM, AAAI 2025, arXiv 2412.11549; constants from the released code, github.com/cantbebetter2/MPQ-DM at 2b05dd7.
Version 2: arXiv 2507.04290, without released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calibration.observers.channel_bits import kurtosis, mix_channel_bits, top_share
from calibration.observers.channel_scaling import channel_ranges, scalable, set_pre_scales, stacked_weight
from calibration.recipe import TrainingContext
from calibration.recipes.efficientdm import EfficientDM
from calibration.reconstruction.blocks import blocks_of
from calibration.run.dtypes import DTYPES
from calibration.run.setting_checks import at_least, within
from calibration.student.layers import StudentLayer
from calibration.student.student import Student
from calibration.training.binary_residual import FIRST_BITS, BinaryResidual, commit
from calibration.training.distillation import distill
from calibration.training.losses import RelationDistillationLoss
from edm_deploy.errors import InputError

UpdateInit = Literal["zero", "error"]


@dataclass(frozen=True, kw_only=True)
class MPQDM(EfficientDM):
    """EfficientDM's settings and those below. A layer remains one integer convolution: bits differ by output channel, and int8 storage holds them all.

    A layer at 4 bits with 5-bit channels is an INT8 layer for a kernel: on backend `cuda` it leaves the INT4 work. `inspect` states the share of it.

    Deviations from the released code: the relation term has a gradient (there, both feature maps are detached, so it trained nothing); it is used in
    every step, over samples of mixed timesteps, instead of in every second step as a mean over two neighbouring timesteps; weights stay symmetric;
    smoothing uses all timesteps, not one batch; relations are those of an average-pooled map of at most 256 pixels. At 2 and at 8 bits
    no channel can have one bit less and another one bit more, so all keep theirs.

    Of version 2 the memory-based relation queue is missing: relations are compared within a batch only. Its binary residual was implemented from the paper's
    description, and its formula is not verified against code, of which none is released. It is not a second convolution here:
    both terms are on one grid of int8 codes (`calibration/training/binary_residual.py`), so a layer with it is an INT8 layer. Leave it at 0 to use 4-bit
    kernels.

    Attributes:
        smoothing: Power of `max|X_c| / max|W_c|` that inputs are divided by. Source: 0.5, SmoothQuant's. 0 is no smoothing.
        mixed_share: Share of each layer's output channels that get one bit more, and as many one bit less, if that lowers the error of its output.
            Source: 0.1.
        relation_weight: Weight of the divergence of pixel relations, summed over the pixels of a sample. Source: 100. At W4A4 on the reference model, 120 steps
            of the preset demo-mpq-dm, 16 images of each of the seeds 123, 1 and 2, the PSNR is 25.1, 28.6, 27.6 dB at 100 and 25.3, 28.4, 27.5 dB at 0,
            a mean of 27.1 dB in both cases.
        residual_share: Share of each layer's output channels, those with the heaviest tails, that get a binary residual (version 2). Source: salient
            channels, number not stated. 0 is version 1.
        update_init: Initial rows of the low-rank update's A: `zero` as in EfficientDM; `error` along the leading right singular vectors of the weight's
            rounding error (version 2). The update itself is zero initially in both cases: the float weight that it is added to contains that error.
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

    def fit(self, context: TrainingContext) -> None:
        """Smooth, calibrate and mix bits, unless a checkpoint is resumed or an artifact has all of it; then train."""
        student, run = context.student, context.run
        if self.smoothing and run.calibrates:
            self.smooth(context)
        self.prepare(context)
        if not run.options.resume:
            student.compute_dtype = torch.float32
            if run.calibrates:
                mixed, layers = mix_channel_bits(context, self, self.mixed_share)
                run.notes.update(mixed_layers=mixed, layers=layers)
            if self.update_init == "error":
                for layer in student.layers.values():
                    if layer.lora_a is not None:
                        init_lora_from_error(layer)
            student.compute_dtype = DTYPES[self.compute]
        if self.residual_share:
            self.add_residuals(student)
        terms = [RelationDistillationLoss(last_block(student), self.relation_weight)] if self.relation_weight else []
        distill(context, self.groups(student), self.schedule, terms=terms)
        if self.residual_share:
            run.notes.update(residual_channels=commit(student.layers.values()))

    def add_residuals(self, student: Student) -> None:
        """Give the channels with the heaviest tails a second term; resuming replaces the selection by that of the checkpoint."""
        for name, layer in student.layers.items():
            if student.family.placement(name) == "quantize" and layer.bits in FIRST_BITS:
                layer.rounding = BinaryResidual(layer, top_share(kurtosis(layer.merged_weight().detach()), self.residual_share))

    def smooth(self, context: TrainingContext) -> None:
        """Divide the input of every layer by `s_c = (max|X_c| / max|W_c|)^smoothing`; layers that receive the same input share it."""
        student = context.student
        ranges = channel_ranges(context, scalable(student))
        scales = {name: smoothing_scales(each.amax(), stacked_weight(student, name), self.smoothing) for name, each in ranges.items()}
        set_pre_scales(student, self, {name: 1 / scale for name, scale in scales.items()})


def smoothing_scales(amax: Tensor, weight: Tensor, power: float) -> Tensor:
    """`(max|X_c| / max|W_c|)^power`, normalized to a geometric mean of 1, which does not affect quantization; 1 for channels that are always 0.

    Args:
        amax: float32 [Cin], max|X_c|.
        weight: float32 [Cout, Cin, kernel].
        power: 0 to 1.

    Returns:
        float32 [Cin], each > 0.
    """
    largest = weight.abs().amax((0, 2))
    alive = (amax > 0) & (largest > 0)
    logs = torch.where(alive, (amax / largest).log(), 0.0) * power
    mean = logs.sum() / alive.sum().clamp(min=1)
    return torch.where(alive, (logs - mean).exp(), 1.0)


@torch.no_grad()
def init_lora_from_error(layer: StudentLayer) -> None:
    """Set the rows of A to the leading directions of the rounding error; B stays zero, and A keeps its norm."""
    assert layer.lora_a is not None  # added by `prepare`
    error = (layer.merged_weight() - layer.rounded_weight()).flatten(1)
    # Not torch.svd_lowrank: it draws from the global generator.
    rows = torch.linalg.svd(error, full_matrices=False).Vh[: len(layer.lora_a)]
    layer.lora_a.copy_(rows * (layer.lora_a.norm() / rows.norm()))


def last_block(student: Student) -> str:
    """Name of the last block with several sites: of a UNet the last one of its decoder."""
    blocks = blocks_of(student, "block")
    return next((block for block in reversed(blocks) if len(block.sites) > 1), blocks[-1]).modules[-1]


RECIPE = MPQDM
