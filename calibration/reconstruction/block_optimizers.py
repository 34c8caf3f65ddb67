"""What of a block is learned while it is reconstructed: the rounding of its weights, the scales of its activations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from calibration.reconstruction import adaround
from calibration.reconstruction.adaround import AdaRound
from calibration.student.layers import ActivationQuantizer, StudentLayer
from calibration.student.student import Student
from calibration.training.param_group import ParamGroup
from calibration.training.trainable_weights import detach_weight, mean_scale


class BlockOptimizer(Protocol):
    """What is learned of a block, and how fast. A group's rate is how far Adam may move its parameters in all the training of a block: each step takes
    its share of the way, so that a training of few steps takes longer ones.
    """

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """Make a block ready; what is learned of it. The quantizers serve these layers alone."""

    def factor(self, share: float) -> float:
        """What the rates are multiplied by when `share` of the training is over, 0 to 1."""

    def penalty(self, share: float) -> Tensor | None:
        """What is added to the distance, a scalar; None is nothing."""

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """Leave in the block what was learned, and nothing else."""


class LearnRounding:
    """AdaRound, from the float weights whenever it begins, though a block was rounded before.

    Args:
        student: Its weights as they stand now are the float ones.
        travel: How far Adam may move a logit in all; from one side to the other it is 5.
        weight: Of the regularizer.
    """

    def __init__(self, student: Student, *, travel: float, weight: float) -> None:
        self.float_weights = {id(layer): layer.layer.weight for layer in student.layers.values()}
        self.travel, self.weight = travel, weight
        self.learned: list[AdaRound] = []

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """The logits of the layers."""
        for layer in layers:
            layer.layer.weight = self.float_weights[id(layer)]
        self.learned = adaround.begin(layers)
        return [ParamGroup([learned.logits for learned in self.learned], self.travel)]

    def factor(self, share: float) -> float:
        """1: the rate stays."""
        return 1.0

    def penalty(self, share: float) -> Tensor | None:
        """The regularizer of all layers, with its exponent of now; nothing while it warms up. Equation 24 of AdaRound."""
        exponent = adaround.exponent_at(share)
        if exponent is None:
            return None
        total: Tensor = sum((learned.penalty(exponent) for learned in self.learned[1:]), self.learned[0].penalty(exponent))
        return self.weight * total

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """Commit."""
        adaround.commit(layers)
        self.learned = []


class LearnScales:
    """Activation scales and bounds, straight through the rounding (LSQ, arXiv 1902.08153); rates fall as half a cosine.

    Args:
        travel: How far Adam may move the logarithm of a scale in all, before the cosine halves it.
        bound_travel: Likewise of the lowest code, where the range is asymmetric.
        static: Whether all rows of a table are one, and learn as one.
    """

    def __init__(self, *, travel: float, bound_travel: float = 0.0, static: bool = False) -> None:
        self.travel, self.bound_travel, self.static = travel, bound_travel, static
        self.handles: list[Any] = []  # torch's RemovableHandle

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """The tables of the quantizers."""
        scales = [quantizer.log_scale for quantizer in quantizers]
        bounds = [quantizer.qmin for quantizer in quantizers if quantizer.qmin.requires_grad]
        if self.static:
            # One gradient for all rows: Adam then moves them alike.
            hooks = (value.register_hook(_summed) for value in (*scales, *bounds))  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.handles = list(hooks)
        return [group for group in (ParamGroup(scales, self.travel), ParamGroup(bounds, self.bound_travel)) if group.parameters]

    def factor(self, share: float) -> float:
        """Half a cosine, from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * share))

    def penalty(self, share: float) -> Tensor | None:
        """Nothing."""
        return None

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """The tables hold what was learned."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def quantizers_inside(student: Student, sites: Sequence[str]) -> list[ActivationQuantizer]:
    """Those that serve these layers and no others."""
    outside = {id(layer.quantizer) for name, layer in student.layers.items() if name not in sites}
    found = {id(quantizer): quantizer for quantizer in (student.layers[site].quantizer for site in sites) if quantizer is not None}
    return [quantizer for key, quantizer in found.items() if key not in outside]


@contextmanager
def train_only(
    layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer], groups: Sequence[ParamGroup]
) -> Iterator[Callable[[], None]]:
    """Within it only the parameters of the groups get a gradient; what it yields puts them back to how they were."""
    chosen = [parameter for group in groups for parameter in group.parameters]
    everything = {id(value): value for module in (*layers, *quantizers) for value in module.parameters()}
    flags = {key: value.requires_grad for key, value in everything.items()}
    copies = [parameter.detach().clone() for parameter in chosen]

    @torch.no_grad()
    def undo() -> None:
        for parameter, copy in zip(chosen, copies, strict=True):
            parameter.copy_(copy)

    for value in everything.values():
        value.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield undo
    finally:
        for key, value in everything.items():
            value.requires_grad_(flags[key])
            value.grad = None


def _summed(grad: Tensor) -> Tensor:
    return grad.sum().expand_as(grad).contiguous()


class LearnWeights:
    """A block's weights and their scales, straight through the rounding; the rates fall linearly.

    Args:
        travel: How far Adam may move a weight in all, in its layer's mean weight scale, before the fall halves it.
        scale_travel: Likewise the logarithm of a weight scale.
    """

    def __init__(self, *, travel: float, scale_travel: float) -> None:
        self.travel, self.scale_travel = travel, scale_travel

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """Weights, a group a layer, and all scales."""
        groups = [ParamGroup([detach_weight(layer)], self.travel * mean_scale(layer)) for layer in layers]
        return [*groups, ParamGroup([layer.log_weight_scale for layer in layers], self.scale_travel)]

    def factor(self, share: float) -> float:
        """From 1 to 0."""
        return 1 - share

    def penalty(self, share: float) -> Tensor | None:
        """Nothing."""
        return None

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """The layers hold what was learned."""
