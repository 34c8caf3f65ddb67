"""QuEST: selective fine-tuning of the layers that quantization hurts most, on their own outputs and on the prediction; tables by timestep throughout.

Source: Wang et al., QuEST, ICCV 2025, arXiv 2402.03666; constants from the released code, github.com/hatchetProject/QuEST at a357018. That
repository has no licence: nothing of it is taken but what its settings are.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calibration.data.trajectory_pool import Trajectories
from calibration.observers.channel_scaling import ChannelRanges, channel_ranges, scalable, set_pre_scales
from calibration.observers.scale_search import SMALLEST_SCALE
from calibration.recipes._distilling import DistillationRecipe
from calibration.run.options import Run
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher
from calibration.training import distillation
from calibration.training.losses import LayerOutputLoss
from calibration.training.param_group import ParamGroup
from calibration.training.trainable_weights import detach_bias, detach_weight, mean_scale
from edm_deploy.errors import InputError
from edm_deploy.network.family import LAYER_GROUPS

PerChannel = Literal["split", "off", "exact"]
FEW = 4  # activation bits at which the released code gives each input channel a scale of its own
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Quest(DistillationRecipe):
    """Calibrates, then trains weights and biases of the tuned groups, and every activation table, together.

    The paper's published 4-bit results rest on a scale for each timestep and each input channel. No integer kernel can compute that: the scale would
    stand inside the sum over input channels. Here these scales are observed and split in log space into a static vector by input channel, which
    multiplies the input, and a table by timestep (rank one), which is searched again on the scaled input and then trained.

    Layers that see the timestep alone are tuned like the others; --fold-time makes a table of what they compute instead, which is exact.

    Unlike the released code: one loop over mixed timesteps trains all that its two stages train one after the other, a timestep at a time with an
    optimizer made anew each time; the local term stands in every case (it is commented out but for Stable Diffusion); bounds are trained and are
    integers; weights start from the least rounding error and not from Q-Diffusion's AdaRound, which ran 20000 steps a block before; attention's
    products stay in floating point; first and last layers keep 8-bit weights too.

    Attributes:
        tuned: Groups whose weights are trained, joined by `+`. Source: the three that stand here. A pixel UNet has no feed-forward layers; which
            groups were there is in the provenance. `convolution` and `skip` can be added where a model has little else.
        per_channel: `split` as above, where inputs get 4 bits or fewer; `off` leaves inputs as they are; `exact` is refused. Source: exact.
        strength: Power of the static vector: 1 is the split itself; less leaves the weights more even. Source: none.
        steps: Training steps. Source: 20 epochs of 20 timesteps of 16 batches.
        batch: Samples a step. Source: 4.
        local_weight: Of the mean over tuned layers of their relative output error, against the prediction's. Source: 1, a sum over layers.
        weight_rate: Rate of weights, in units of their layer's mean weight scale. Source: 1e-5 absolute, about this much of a usual scale of 0.01.
        bias_rate: Rate of biases. Source: 1e-5.
        scale_rate: Relative rate of the activation scales. Source: 1e-4, absolute there.
        bound_rate: Rate of the activation bounds, in codes. Source: none, zero-points stay.
    """

    name = "quest"
    rows: int = 20
    tuned: str = "time_embedding+attention+feed_forward"
    per_channel: PerChannel = "split"
    strength: float = 1.0
    steps: int = 6400
    local_weight: float = 1.0
    weight_rate: float = 1e-3
    bias_rate: float = 1e-5
    scale_rate: float = 1e-4
    bound_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("local_weight", "weight_rate", "bias_rate"):
            at_least(name, getattr(self, name), 0.0)
        within("strength", self.strength, 0.0, 1.0)
        if unknown := [group for group in self.groups_tuned if group not in LAYER_GROUPS]:
            raise InputError(f"tuned names {unknown[0]!r}; expected groups of {', '.join(LAYER_GROUPS)}, joined by '+'. Set another tuned.")
        if self.per_channel == "exact":
            raise InputError(
                "per_channel is 'exact': a scale for each input channel stands inside the sum that a kernel takes over input channels, so no integer "
                "kernel can compute with it. Set per_channel=split, which keeps a static factor by channel and a table by timestep."
            )
        if self.per_channel not in get_args(PerChannel):
            raise InputError(f"per_channel is {self.per_channel!r}; expected split or off. Set another per_channel.")

    @property
    def groups_tuned(self) -> tuple[str, ...]:
        """Names of the groups whose weights are trained."""
        return tuple(self.tuned.split("+")) if self.tuned else ()

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Split and calibrate, unless a checkpoint is resumed; then tune."""
        tuned = [name for name in student.layers if student.family.group(name) in self.groups_tuned]
        present = {student.family.group(name) for name in tuned}
        weights = sum(student.layers[name].layer.weight.numel() for name in tuned)
        every = sum(layer.layer.weight.numel() for layer in student.layers.values())
        run.notes.update(tuned_groups=[group for group in self.groups_tuned if group in present], tuned_weights=round(weights / every, 4))
        if not run.options.resume:
            if self.per_channel == "split" and self.act_bits <= FEW:
                self.split(student, teacher, trajectories, run)
            super().fit(student, teacher, trajectories, run)
        student.compute_dtype = DTYPES[self.compute]
        groups = self.groups(student, tuned)
        # The distance counts every element of the prediction, and so does the term.
        local = LayerOutputLoss(tuned, self.local_weight * math.prod(trajectories.shape) / max(len(tuned), 1))
        distillation.distill(
            student, teacher, trajectories, groups, self.schedule, run, terms=[local] if tuned and self.local_weight else []
        )

    def split(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Observe the scale of every input channel at every timestep, and give the static part to the pre-scales."""
        ranges = channel_ranges(student, teacher, trajectories, scalable(student))
        splits = {name: rank_one(observed_scales(seen)) for name, seen in ranges.items()}
        residuals = torch.stack([split.residual for split in splits.values()])
        spread = float(residuals.square().mean().sqrt())
        run.notes.update(split_residual_std=spread)
        log.warning(
            "QuEST's scales by input channel and timestep fit no integer kernel; they were split into a static factor and a table, which differ "
            "from them by a standard deviation of %.3f in log space (a factor of %.2f), %.3f in the worst layer.",
            spread,
            math.exp(spread),
            float(residuals.max()),
        )
        set_pre_scales(student, self, {name: split.log_channel.mul(-self.strength).exp() for name, split in splits.items()})

    def groups(self, student: Student, tuned: list[str]) -> list[ParamGroup]:
        """What is trained, and how fast: weights and biases of the tuned layers, the tables of all."""
        layers = [student.layers[name] for name in tuned]
        groups = [ParamGroup([detach_weight(layer)], self.weight_rate * mean_scale(layer)) for layer in layers]
        biases = [bias for bias in map(detach_bias, layers) if bias is not None]
        groups.append(ParamGroup(biases, self.bias_rate))
        return groups + self.table_groups(student)


@dataclass(frozen=True)
class RankOne:
    """`log s[t, c] ~ log_table[t] + log_channel[c]`.

    Attributes:
        log_table: float32 [R].
        log_channel: float32 [Cin], of mean 0.
        residual: Standard deviation of what is left, a scalar.
    """

    log_table: Tensor
    log_channel: Tensor
    residual: Tensor


def rank_one(scales: Tensor) -> RankOne:
    """The best split of scales by timestep and channel, float32 [R, Cin] each > 0, in least squares of their logarithms: row and column means."""
    logs = scales.log()
    rows = logs.mean(1)
    channels = logs.mean(0) - logs.mean()
    return RankOne(rows, channels, (logs - rows[:, None] - channels).square().mean().sqrt())


def observed_scales(seen: ChannelRanges) -> Tensor:
    """The span of each channel at each row, float32 [R, Cin]: its scale but for the number of codes, which all share.

    A channel that is (nearly) dead counts a hundredth of its row's mean, so that its weights do not outgrow the others.
    """
    span = (seen.high - seen.low).clamp(min=SMALLEST_SCALE)
    return torch.maximum(span, span.mean(1, keepdim=True) / 100)


RECIPE = Quest
