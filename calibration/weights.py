"""Weights and biases that are trained themselves, without a low-rank update between."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from calibration.distill import Group
from calibration.layers import ActivationQuantizer, StudentLayer


def own_weight(layer: StudentLayer) -> nn.Parameter:
    """The layer's float weight as a parameter of its own, for training: until now it may have been the teacher's too."""
    layer.layer.weight = nn.Parameter(layer.layer.weight.detach().float().clone(), requires_grad=False)
    return layer.layer.weight


def own_bias(layer: StudentLayer) -> nn.Parameter | None:
    """Likewise its bias; None where it has none."""
    if layer.layer.bias is None:
        return None
    layer.layer.bias = nn.Parameter(layer.layer.bias.detach().float().clone(), requires_grad=False)
    return layer.layer.bias


def mean_scale(layer: StudentLayer) -> float:
    """The mean weight scale of a layer: one step of its codes, the unit of rates (EfficientDM, arXiv 2310.03270, scale-aware optimization)."""
    return float(layer.log_weight_scale.detach().exp().mean())


class LearnWeights:
    """A block's weights and their scales, straight through the rounding; the rates fall linearly.

    Args:
        travel: How far Adam may move a weight in all, in its layer's mean weight scale, before the fall halves it.
        scale_travel: Likewise the logarithm of a weight scale.
    """

    def __init__(self, *, travel: float, scale_travel: float) -> None:
        self.travel, self.scale_travel = travel, scale_travel

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[Group]:
        """Weights, a group a layer, and all scales."""
        groups = [Group([own_weight(layer)], self.travel * mean_scale(layer)) for layer in layers]
        return [*groups, Group([layer.log_weight_scale for layer in layers], self.scale_travel)]

    def factor(self, share: float) -> float:
        """From 1 to 0."""
        return 1 - share

    def penalty(self, share: float) -> Tensor | None:
        """Nothing."""
        return None

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """The layers hold what was learned."""
