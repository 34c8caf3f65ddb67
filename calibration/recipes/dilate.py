"""DilateQuant: weights dilated into the room that their scales leave, timesteps mixed in every batch, blocks distilled from the float network's.

Source: Liu et al., DilateQuant, ACM MM 2025, arXiv 2409.14307. Constants are the paper's; github.com/BienLuky/DilateQuant was not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calibration.data.trajectory_pool import Trajectories
from calibration.observers.channel_scaling import scalable, stacked_weight
from calibration.recipes._reconstructing import sample_trajectories
from calibration.recipes.mse import Mse
from calibration.reconstruction.block_optimizers import LearnScales, LearnWeights
from calibration.reconstruction.blocks import Partition, check_partition
from calibration.reconstruction.reconstruct import Stage, reconstruct
from calibration.run.options import Run
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher
from calibration.training import distillation
from edm_deploy.network.restructure import representable


@dataclass(frozen=True, kw_only=True)
class Dilate(Mse):
    """Weight dilation (WD), a time-parallel quantizer (TPQ: each sample of a batch has its own row), block-wise distillation (BKD).

    Each block in turn learns from what the quantized network before it gives. Rates are told as the way that Adam may go in all the training of a
    block, so that one of fewer steps takes longer ones, up to 0.05.

    Not repeated: tables for each head of attention, whose products stay in floating point here; a rate of 1e-2 for weights as they are, which moves
    them by a code at each step where their scale is 0.01.

    Attributes:
        dilation: Whether weights are dilated.
        steps: Training steps of a block. Source: 5000.
        batch: Samples a step. Source: 32.
        samples: Inputs that the blocks learn on, at mixed timesteps. Source: 5120.
        weight_travel: How far a weight may move, in its layer's mean weight scale. Source: see above; 5000 steps of 1e-3.
        weight_scale_travel: Of the logarithm of weight scales. Source: 5000 steps of 1e-4.
        scale_travel: Of the logarithm of activation scales. Source: 5000 steps of 1e-4.
        bound_travel: Of the lowest activation code. Source: 5000 steps of 1e-4, of zero-points in codes.
        partition: What is distilled together: `block`, `layer`, or blocks joined and cut by `entropy` (Q-VLM). Source: block.
        compute: What the student computes in. Its scales and rounding are float32 always.
    """

    name = "dilate"
    trains = True
    weight_bits: int = 4
    act_bits: int = 4
    bias_correction: bool = False
    dilation: bool = True
    steps: int = 5000
    batch: int = 32
    samples: int = 5120
    weight_travel: float = 5.0
    weight_scale_travel: float = 0.5
    scale_travel: float = 0.5
    bound_travel: float = 0.5
    partition: Partition = "block"
    compute: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "samples"):
            at_least(name, getattr(self, name), 1)
        for name in ("weight_travel", "weight_scale_travel", "scale_travel", "bound_travel"):
            at_least(name, getattr(self, name), 0.0)
        check_partition(self.partition)
        if self.compute not in DTYPES:
            distillation.refuse_compute(self.compute)

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Dilate and calibrate, unless a checkpoint is resumed; then distill block by block."""
        if not run.options.resume:
            if self.dilation:
                dilate(student)
            super().fit(student, teacher, trajectories, run)
        student.compute_dtype = DTYPES[self.compute]
        stage = Stage(
            learners=[
                LearnWeights(travel=self.weight_travel, scale_travel=self.weight_scale_travel),
                LearnScales(travel=self.scale_travel, bound_travel=self.bound_travel),
            ],
            steps=self.steps,
            batch=self.batch,
            samples=self.samples,
            draw=lambda count: sample_trajectories(trajectories, teacher, count),
        )
        reconstruct(student, teacher, trajectories, self.partition, [stage], run, seed=self.seed)


@torch.no_grad()
def dilate(student: Student) -> None:
    """WD: divide the input of every layer by what its weights can be multiplied by without moving any output channel's extremes.

    Weight scales stay as they are: they are what dilation must not change. The layers that are fed the same share one dilation.
    """
    for name in scalable(student):
        factors = dilation_factors(stacked_weight(student, name))
        if bool((factors > 1).any()):
            student.set_pre_scale(name, pre_scale_of(factors))


def dilation_factors(weight: Tensor) -> Tensor:
    """How much each input channel can be dilated: `s_k = min over o of W_max,o / W+_ok and W_min,o / W-_ok`.

    W+_ok and W-_ok are the largest and smallest weight of input channel k in output channel o. A channel that is an extreme of any output is
    saturated: its quotient there is 1, and so is its factor. Section 4.1.

    Args:
        weight: float32 [Cout, Cin, kernel].

    Returns:
        float32 [Cin], each >= 1. A channel of zeros stays at 1.
    """
    high, low = weight.amax(2), weight.amin(2)
    highest, lowest = high.amax(1, keepdim=True), low.amin(1, keepdim=True)
    room = torch.full_like(high, torch.inf)
    room = torch.where(high > 0, torch.minimum(room, highest / high), room)
    room = torch.where(low < 0, torch.minimum(room, lowest / low), room).amin(0)
    return torch.where(room.isfinite(), room, 1.0).clamp(min=1.0)


def pre_scale_of(factors: Tensor) -> Tensor:
    """`1 / s`, float32 [Cin], where float16 holds no such number the next larger one, so that no weight leaves its channel's extremes."""
    scale = representable(1 / factors)
    return torch.where(scale * factors < 1, representable(scale * (1 + 2**-10)), scale)


RECIPE = Dilate
