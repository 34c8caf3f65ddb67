"""DilateQuant: weights dilated within the range of their scales, timesteps mixed in every batch, block-wise distillation.

Source: Liu et al., DilateQuant, ACM MM 2025, arXiv 2409.14307. Constants are the paper's; github.com/BienLuky/DilateQuant was not read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.observers.channel_scaling import scalable, stacked_weight
from calibration.recipe import TrainingContext
from calibration.recipes._reconstructing import sample_trajectories
from calibration.recipes.mse import LeastSquares
from calibration.reconstruction.block_optimizers import ActivationScaleOptimizer, WeightOptimizer
from calibration.reconstruction.blocks import Partition, check_partition
from calibration.reconstruction.reconstruct import Stage, reconstruct
from calibration.run.dtypes import DTYPES, ComputeDtype, check_dtype
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from edm_deploy.network.restructure import block_of, representable


@dataclass(frozen=True, kw_only=True)
class Dilate(LeastSquares):
    """Weight dilation (WD), a time-parallel quantizer (TPQ: each sample of a batch has its own row), block-wise distillation (BKD).

    Each block in turn is trained on its input in the quantized network. Rates are given as the total step length of Adam over the training of a
    block, so that fewer steps are longer ones, up to 0.1.

    Deviations from the paper: no tables per attention head, because attention's matrix products stay in floating point here; no absolute rate of
    1e-2 for weights, which moves them by one code per step if their scale is 0.01.

    Attributes:
        dilation: Whether weights are dilated.
        steps: Training steps per block. Source: 5000.
        batch: Samples per step. Source: 32.
        samples: Inputs that the blocks are trained on, at mixed timesteps. Source: 5120.
        weight_travel: Total step length of a weight, in units of its layer's mean weight scale. Source: see above; 5000 steps of 1e-3.
        weight_scale_travel: Total step length of the logarithm of a weight scale. Source: 5000 steps of 1e-4.
        scale_travel: Total step length of the logarithm of an activation scale. Source: 5000 steps of 1e-4.
        bound_travel: Total step length of the lowest activation code. Source: 5000 steps of 1e-4, of zero-points in codes.
        partition: What is distilled together: `block`, `layer`, or blocks joined and divided by `entropy` (Q-VLM). Source: block.
        compute: Dtype in which the student computes. Scales and rounding are always float32.
        step_weighting: Power of the effect of each sampling step on the final sample that its errors are multiplied by. Source: none, 0.
    """

    name = "dilate"
    trains = True
    starts_from_artifact = True
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
    compute: ComputeDtype = "bf16"
    step_weighting: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "samples"):
            at_least(name, getattr(self, name), 1)
        for name in ("weight_travel", "weight_scale_travel", "scale_travel", "bound_travel", "step_weighting"):
            at_least(name, getattr(self, name), 0.0)
        check_partition(self.partition)
        check_dtype("compute", self.compute)

    @property
    def comparison_of_layers(self) -> str | None:
        """`partition=block`, unless set."""
        return None if self.partition == "block" else "partition=block"

    def fit(self, context: TrainingContext) -> None:
        """Dilate and calibrate, unless a checkpoint is resumed; then distill block by block."""
        student = context.student
        if not context.run.options.resume:
            if self.dilation and context.run.calibrates:
                dilate(student)
            super().fit(context)
        student.compute_dtype = DTYPES[self.compute]
        stage = Stage(
            optimizers=[
                WeightOptimizer(step_length=self.weight_travel, scale_step_length=self.weight_scale_travel),
                ActivationScaleOptimizer(step_length=self.scale_travel, bound_step_length=self.bound_travel),
            ],
            steps=self.steps,
            batch=self.batch,
            samples=self.samples,
            draw=lambda count: sample_trajectories(context.trajectories, context.teacher, count),
        )
        reconstruct(context, self.partition, [stage], seed=self.seed, step_weighting=self.step_weighting)


@torch.no_grad()
def dilate(student: Student) -> None:
    """WD: divide the input of every layer by the largest factor that its weights can be multiplied by within the extremes of every output channel.

    Weight scales are not changed: dilation preserves them by construction. Layers that receive the same input share one dilation. Layers whose input is rotated
    are left out: a rotation moves the extremes of the output channels.
    """
    for name in scalable(student):
        if block_of(student.layers[name].layer) is not None:
            continue
        factors = dilation_factors(stacked_weight(student, name))
        if bool((factors > 1).any()):
            student.set_pre_scale(name, pre_scale_of(factors))


def dilation_factors(weight: Tensor) -> Tensor:
    """Dilation factor of each input channel: `s_k = min over o of W_max,o / W+_ok and W_min,o / W-_ok`.

    W+_ok and W-_ok are the largest and smallest weight of input channel k in output channel o. A channel that attains the extreme of any output is
    saturated: its quotient there is 1, and so is its factor. Section 4.1.

    Args:
        weight: float32 [Cout, Cin, kernel].

    Returns:
        float32 [Cin], each >= 1; 1 for a channel of zeros.
    """
    high, low = weight.amax(2), weight.amin(2)
    highest, lowest = high.amax(1, keepdim=True), low.amin(1, keepdim=True)
    room = torch.full_like(high, torch.inf)
    room = torch.where(high > 0, torch.minimum(room, highest / high), room)
    room = torch.where(low < 0, torch.minimum(room, lowest / low), room).amin(0)
    return torch.where(room.isfinite(), room, 1.0).clamp(min=1.0)


def pre_scale_of(factors: Tensor) -> Tensor:
    """`1 / s`, float32 [Cin], rounded up to the next float16 value, so that no weight exceeds its channel's extremes."""
    scale = representable(1 / factors)
    return torch.where(scale * factors < 1, representable(scale * (1 + 2**-10)), scale)


RECIPE = Dilate
