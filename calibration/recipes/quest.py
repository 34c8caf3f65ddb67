"""QuEST: selective fine-tuning of the layers that quantization affects most, on their outputs and on the prediction; activation tables by timestep.

Source: Wang et al., QuEST, ICCV 2025, arXiv 2402.03666; constants from the released code, github.com/hatchetProject/QuEST at a357018. That
repository has no licence: only its settings are used.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from calibration.observers.channel_scaling import ChannelRanges, channel_ranges, scalable, set_pre_scales
from calibration.observers.scale_search import SMALLEST_SCALE
from calibration.recipe import TrainingContext
from calibration.recipes._distilling import DistillationRecipe
from calibration.run.dtypes import DTYPES
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student
from calibration.training.distillation import distill
from calibration.training.losses import LayerOutputLoss
from calibration.training.param_group import ParamGroup
from calibration.training.trainable_weights import detach_bias, detach_weight, mean_scale
from edm_deploy.errors import InputError
from edm_deploy.network.placement import LAYER_GROUPS

PerChannel = Literal["split", "off", "exact"]
PER_CHANNEL_BITS = 4  # up to so many activation bits the released code uses a scale per input channel
log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Quest(DistillationRecipe):
    """Calibrates, then jointly trains weights and biases of the tuned groups, and every activation table.

    The paper's published 4-bit results use a scale per timestep and input channel. No integer kernel can compute that, because the scale would be
    inside the sum over input channels. Here these scales are observed and split in log space (rank one) into a static vector by input channel, which
    multiplies the input, and a table by timestep, which is searched again on the scaled input and then trained.

    Layers that depend on the timestep alone are tuned like the others; --fold-time replaces their output by a table instead, which is exact.

    Deviations from the released code: one loop over mixed timesteps trains what its two stages train successively, one timestep at a time with a new
    optimizer each; the local term is always used (it is commented out except for Stable Diffusion); bounds are trained and are integers; weights
    start from the least rounding error and not from Q-Diffusion's AdaRound, which needs 20000 prior steps per block; attention's matrix products stay
    in floating point; first and last layers keep 8-bit weights too.

    Attributes:
        tuned: Groups whose weights are trained, joined by `+`. Source: fewer, by kind of model: of Stable Diffusion `ff.net` alone; of the class-conditional
            LDM-4 `ff.net`, every `to_q` and the self-attention's `to_k` and `to_v`; of the unconditional LDM-4 the `qkv` of its attention; and
            the time embedding. The groups of the default hold more: all projections of an attention, its output and its cross-attention's keys and values too.
            A pixel UNet has no feed-forward layers; the groups that exist are in the provenance. `convolution` and `skip` can be added for models with few
            other layers.
        per_channel: `split` as above, if inputs have 4 bits or fewer; `off` does not scale inputs; `exact` is refused. Source: exact.
        strength: Power of the static vector: 1 is the split itself; less keeps the weights more uniform. Source: none.
        steps: Training steps. Source: 20 epochs of 20 timesteps of 16 batches.
        batch: Samples per step. Source: 4.
        local_weight: Weight of the mean over tuned layers of their relative output error, relative to the prediction's. Source: 1, a sum over layers.
        weight_rate: Rate of weights, in units of their layer's mean weight scale. Source: 1e-5 absolute, about this relative to a usual scale of 0.01.
        bias_rate: Rate of biases. Source: 1e-5.
        scale_rate: Relative rate of the activation scales. Source: 1e-4, absolute.
        bound_rate: Rate of the activation bounds, in codes. Source: none, zero-points are fixed.
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
                "per_channel is 'exact': a scale per input channel is inside the sum of a kernel over input channels, so no integer "
                "kernel can compute with it. Set per_channel=split, which uses a static factor by channel and a table by timestep."
            )
        if self.per_channel not in get_args(PerChannel):
            raise InputError(f"per_channel is {self.per_channel!r}; expected split or off. Set another per_channel.")

    @property
    def comparison_of_layers(self) -> str | None:
        """`local_weight=0`, unless set."""
        return "local_weight=0" if self.local_weight else None

    @property
    def groups_tuned(self) -> tuple[str, ...]:
        """Names of the groups whose weights are trained."""
        return tuple(self.tuned.split("+")) if self.tuned else ()

    def fit(self, context: TrainingContext) -> None:
        """Split and calibrate, unless a checkpoint is resumed; then tune."""
        student, run = context.student, context.run
        tuned = [name for name in student.layers if student.family.group(name) in self.groups_tuned]
        present = {student.family.group(name) for name in tuned}
        weights = sum(student.layers[name].layer.weight.numel() for name in tuned)
        total = sum(layer.layer.weight.numel() for layer in student.layers.values())
        run.notes.update(tuned_groups=[group for group in self.groups_tuned if group in present], tuned_weights=round(weights / total, 4))
        if not run.options.resume:
            if run.calibrates and self.per_channel == "split" and self.act_bits <= PER_CHANNEL_BITS:
                self.split(context)
            super().fit(context)
        student.compute_dtype = DTYPES[self.compute]
        # The error of the prediction is summed over its elements; the term is scaled accordingly.
        local = LayerOutputLoss(tuned, self.local_weight * math.prod(context.trajectories.shape) / max(len(tuned), 1))
        distill(context, self.groups(student, tuned), self.schedule, terms=[local] if tuned and self.local_weight else [])

    def split(self, context: TrainingContext) -> None:
        """Observe the scale of every input channel at every timestep, and set the static factors as pre-scales."""
        student = context.student
        ranges = channel_ranges(context, scalable(student))
        splits = {name: rank_one(observed_scales(each)) for name, each in ranges.items()}
        residuals = torch.stack([split.residual for split in splits.values()])
        spread = float(residuals.square().mean().sqrt())
        context.run.notes.update(split_residual_std=spread)
        log.warning(
            "No integer kernel supports QuEST's scales by input channel and timestep; they were split into a static factor and a table, which "
            "deviate from them by a standard deviation of %.3f in log space (a factor of %.2f), %.3f in the worst layer.",
            spread,
            math.exp(spread),
            float(residuals.max()),
        )
        set_pre_scales(student, self, {name: split.log_channel.mul(-self.strength).exp() for name, split in splits.items()})

    def groups(self, student: Student, tuned: list[str]) -> list[ParamGroup]:
        """Trained parameters and their rates: weights and biases of the tuned layers, tables of all layers."""
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
        residual: Standard deviation of the remainder, a scalar.
    """

    log_table: Tensor
    log_channel: Tensor
    residual: Tensor


def rank_one(scales: Tensor) -> RankOne:
    """The least-squares split, in log space, of scales by timestep and channel, float32 [R, Cin] each > 0: row and column means."""
    logs = scales.log()
    rows = logs.mean(1)
    channels = logs.mean(0) - logs.mean()
    return RankOne(rows, channels, (logs - rows[:, None] - channels).square().mean().sqrt())


def observed_scales(ranges: ChannelRanges) -> Tensor:
    """Range width of each channel at each row, float32 [R, Cin]: its scale up to the number of codes, a common factor.

    At least a hundredth of the row's mean, so that the weights of (nearly) dead channels do not grow far beyond the others.
    """
    span = (ranges.high - ranges.low).clamp(min=SMALLEST_SCALE)
    return torch.maximum(span, span.mean(1, keepdim=True) / 100)


RECIPE = Quest
