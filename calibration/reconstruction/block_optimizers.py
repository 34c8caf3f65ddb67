"""What is trained of a block during reconstruction: the rounding of its weights, the weights themselves, the scales of its activations."""

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
    """What is trained of a block, and how fast. The rate of a group is the total step length of Adam over the training of a block: each step has its
    share of it as learning rate, so that fewer steps are longer ones.
    """

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """Prepare a block; returns its trained parameters. The quantizers are those that only these layers use."""

    def factor(self, share: float) -> float:
        """Factor of the rates after `share` of the training, 0 to 1."""

    def penalty(self, share: float) -> Tensor | None:
        """Term added to the reconstruction error, a scalar; None is no term."""

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """Store the trained values in the block, and remove everything else."""


class RoundingOptimizer:
    """AdaRound. Starts from the float weights each time, even if a block was rounded before.

    Args:
        student: Its current weights are the float weights.
        step_length: Total step length of a logit; the distance between rounding down and up is 5.
        weight: Weight of the regularizer.
    """

    def __init__(self, student: Student, *, step_length: float, weight: float) -> None:
        self.float_weights = {id(layer): layer.layer.weight for layer in student.layers.values()}
        self.step_length, self.weight = step_length, weight
        self.roundings: list[AdaRound] = []

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """The logits of the layers."""
        for layer in layers:
            layer.layer.weight = self.float_weights[id(layer)]
        self.roundings = adaround.begin(layers)
        return [ParamGroup([rounding.logits for rounding in self.roundings], self.step_length)]

    def factor(self, share: float) -> float:
        """Always 1: a constant rate."""
        return 1.0

    def penalty(self, share: float) -> Tensor | None:
        """The regularizer of all layers with its current exponent; None during warm-up. Equation 24 of AdaRound."""
        exponent = adaround.exponent_at(share)
        if exponent is None:
            return None
        total: Tensor = sum((rounding.penalty(exponent) for rounding in self.roundings[1:]), self.roundings[0].penalty(exponent))
        return self.weight * total

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """Round every weight up or down."""
        adaround.commit(layers)
        self.roundings = []


class ActivationScaleOptimizer:
    """Activation scales and bounds with straight-through gradients (LSQ, arXiv 1902.08153) and a half-cosine decay of the rates.

    Args:
        step_length: Total step length of the logarithm of a scale, before the decay, which halves it.
        bound_step_length: Total step length of the lowest code of asymmetric ranges, likewise.
        static: Whether all rows of a table are equal, and stay equal in training.
    """

    def __init__(self, *, step_length: float, bound_step_length: float = 0.0, static: bool = False) -> None:
        self.step_length, self.bound_step_length, self.static = step_length, bound_step_length, static
        self.handles: list[Any] = []  # torch's RemovableHandle

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """Scales and bounds of the quantizers."""
        scales = [quantizer.log_scale for quantizer in quantizers]
        bounds = [quantizer.qmin for quantizer in quantizers if quantizer.qmin.requires_grad]
        if self.static:
            # The same gradient for all rows: Adam then updates them equally.
            hooks = (value.register_hook(_sum_over_rows) for value in (*scales, *bounds))  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self.handles = list(hooks)
        return [group for group in (ParamGroup(scales, self.step_length), ParamGroup(bounds, self.bound_step_length)) if group.parameters]

    def factor(self, share: float) -> float:
        """Half a cosine, from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * share))

    def penalty(self, share: float) -> Tensor | None:
        """None: no penalty."""
        return None

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """Remove the gradient hooks; the tables contain the trained values."""
        for handle in self.handles:
            handle.remove()
        self.handles = []


def quantizers_inside(student: Student, sites: Sequence[str]) -> list[ActivationQuantizer]:
    """The quantizers that only these layers use."""
    outside = {id(layer.quantizer) for name, layer in student.layers.items() if name not in sites}
    inside = {id(quantizer): quantizer for quantizer in (student.layers[site].quantizer for site in sites) if quantizer is not None}
    return [quantizer for key, quantizer in inside.items() if key not in outside]


@contextmanager
def train_only(
    layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer], groups: Sequence[ParamGroup]
) -> Iterator[Callable[[], None]]:
    """Within the context only the parameters of the groups require gradients; the yielded function restores their values at entry."""
    trained = [parameter for group in groups for parameter in group.parameters]
    everything = {id(value): value for module in (*layers, *quantizers) for value in module.parameters()}
    flags = {key: value.requires_grad for key, value in everything.items()}
    copies = [parameter.detach().clone() for parameter in trained]

    @torch.no_grad()
    def undo() -> None:
        for parameter, copy in zip(trained, copies, strict=True):
            parameter.copy_(copy)

    for value in everything.values():
        value.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        yield undo
    finally:
        for key, value in everything.items():
            value.requires_grad_(flags[key])
            value.grad = None


def _sum_over_rows(grad: Tensor) -> Tensor:
    return grad.sum().expand_as(grad).contiguous()


class WeightOptimizer:
    """A block's weights and weight scales with straight-through gradients and a linear decay of the rates.

    Args:
        step_length: Total step length of a weight in units of its layer's mean weight scale, before the decay, which halves it.
        scale_step_length: Total step length of the logarithm of a weight scale, likewise.
    """

    def __init__(self, *, step_length: float, scale_step_length: float) -> None:
        self.step_length, self.scale_step_length = step_length, scale_step_length

    def begin(self, layers: Sequence[StudentLayer], quantizers: Sequence[ActivationQuantizer]) -> list[ParamGroup]:
        """Weights, one group per layer, and all weight scales."""
        groups = [ParamGroup([detach_weight(layer)], self.step_length * mean_scale(layer)) for layer in layers]
        return [*groups, ParamGroup([layer.log_weight_scale for layer in layers], self.scale_step_length)]

    def factor(self, share: float) -> float:
        """Linear, from 1 to 0."""
        return 1 - share

    def penalty(self, share: float) -> Tensor | None:
        """None: no penalty."""
        return None

    def end(self, layers: Sequence[StudentLayer]) -> None:
        """Nothing to do: the layers contain the trained values."""
