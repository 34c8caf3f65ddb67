"""Output channels that stand out: how heavy the tails of their weights are, and bits moved from the lightest to the heaviest."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.data.trajectory_pool import Trajectories
from calibration.recipe import Recipe
from calibration.run.parallel_map import each_in_a_thread
from calibration.student.layers import StudentLayer
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.network.restructure import scaled_input
from edm_deploy.numerics.codes import WEIGHT_BITS, dequantize_weight, quantize_weight


def kurtosis(weight: Tensor) -> Tensor:
    """Of each output channel's weights: `mean((w - mean)^4) / var^2`, 3 for a normal distribution. float32 [Cout] of [Cout, ...]; 0 where all are alike."""
    centred = weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)
    variance = centred.square().mean(1)
    return torch.where(variance > 0, centred.pow(4).mean(1) / variance.square(), 0.0)


def top_share(score: Tensor, share: float) -> Tensor:
    """Which channels are among the `share`, rounded up, of the highest score: bool [C], of float32 [C]."""
    chosen = torch.zeros_like(score, dtype=torch.bool)
    chosen[score.argsort(stable=True, descending=True)[: math.ceil(len(score) * share)]] = True
    return chosen


def mixed_bits(score: Tensor, bits: int, share: float) -> Tensor | None:
    """`bits` + 1 for the channels of the highest score, `bits` - 1 for as many of the lowest, so that the mean stays: uint8 [Cout].

    Args:
        score: float32 [Cout].
        bits: Of the others.
        share: Of the channels at each end, 0 to 0.5, rounded down.

    Returns:
        None where no channel can change: a bit less or more is none that weights can have, or the share is less than a channel.
    """
    count = int(len(score) * share)
    if not count or bits - 1 not in WEIGHT_BITS or bits + 1 not in WEIGHT_BITS:
        return None
    order = score.argsort(stable=True)
    mixed = torch.full_like(order, bits, dtype=torch.uint8)
    mixed[order[:count]], mixed[order[-count:]] = bits - 1, bits + 1
    return mixed


def scales_of(recipe: Recipe, weight: Tensor, bits: Tensor) -> Tensor:
    """The recipe's scale of each output channel at its own bits: float32 [Cout], of [Cout, ...] and uint8 [Cout]."""
    scale = torch.empty(len(bits), device=weight.device)
    for each in sorted(set(bits.tolist())):
        chosen = bits == each
        scale[chosen] = recipe.weight_scale(weight[chosen], each)
    return scale


@torch.no_grad()
def mix_channel_bits(student: Student, teacher: Teacher, trajectories: Trajectories, recipe: Recipe, share: float) -> tuple[int, int]:
    """Give the layers at the recipe's bits channels of one bit more and one less, wherever that lowers the squared error of the layer's output.

    Args:
        student: Calibrated; its weights as they stand, pre-scaled where they are.
        teacher: Gives the inputs that the error is measured on.
        trajectories: Staggered; the next samples in turn are looked at, and stay where they are.
        recipe: Searches the weight scales.
        share: Of each layer's channels at either end.

    Returns:
        Layers that were changed, and layers in all.
    """
    layers = {name: layer for name, layer in student.layers.items() if student.family.placement(name) == "quantize"}
    tried: dict[str, tuple[Tensor, Tensor]] = {}

    def propose(name: str) -> None:
        weight = layers[name].merged_weight()
        bits = mixed_bits(kurtosis(weight), layers[name].bits, share)
        if bits is not None:
            tried[name] = bits, scales_of(recipe, weight, bits)

    each_in_a_thread(propose, layers)
    better: dict[str, bool] = {}

    def look(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            layer, (bits, scale) = layers[name], tried[name]
            x, weight = scaled_input(layer.layer, args[0].float()), layer.merged_weight()
            mixed = dequantize_weight(quantize_weight(weight, scale, bits), scale)
            plain = dequantize_weight(*layer.codes())
            better[name] = bool(_power(layer, x, mixed - weight) < _power(layer, x, plain - weight))

        return hook

    handles = [teacher.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in tried]
    at = trajectories.next_member
    try:
        teacher(trajectories.take(min(trajectories.size, 2 * trajectories.rows)).inputs)
    finally:
        trajectories.next_member = at
        for handle in handles:
            handle.remove()
    for name in (name for name, gains in better.items() if gains):
        bits, scale = tried[name]
        layers[name].set_channel_bits(bits)
        layers[name].set_weight_scale(scale)
    return sum(better.values()), len(layers)


def _power(layer: StudentLayer, x: Tensor, error: Tensor) -> Tensor:
    """Squared output of a layer whose weight is `error`: a scalar."""
    if isinstance(layer.layer, nn.Linear):
        return functional.linear(x, error).square().sum()
    conv = layer.layer
    return functional.conv2d(x, error, None, conv.stride, conv.padding, conv.dilation, conv.groups).square().sum()
