"""Mixed precision by output channel: bits are moved from channels with light-tailed weights to those with heavy tails."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.recipe import Recipe, TrainingContext
from calibration.run.parallel_map import parallel_map
from calibration.student.layers import StudentLayer
from calibration.student.module_outputs import input_hooks
from edm_deploy.network.restructure import site_input
from edm_deploy.numerics.codes import WEIGHT_BITS, dequantize_weight, quantize_weight


def kurtosis(weight: Tensor) -> Tensor:
    """Kurtosis of each output channel's weights, `mean((w - mean)^4) / var^2`, 3 for a normal distribution: float32 [Cout] of [Cout, ...]; 0 if constant."""
    centred = weight.flatten(1) - weight.flatten(1).mean(1, keepdim=True)
    variance = centred.square().mean(1)
    return torch.where(variance > 0, centred.pow(4).mean(1) / variance.square(), 0.0)


def top_share(score: Tensor, share: float) -> Tensor:
    """Whether each channel is among the `share`, rounded up, of highest score: bool [C], of float32 [C]."""
    top = torch.zeros_like(score, dtype=torch.bool)
    top[score.argsort(stable=True, descending=True)[: math.ceil(len(score) * share)]] = True
    return top


def mixed_bits(score: Tensor, bits: int, share: float) -> Tensor | None:
    """`bits` + 1 for the channels of highest score and `bits` - 1 for as many of lowest score, which preserves the mean: uint8 [Cout].

    Args:
        score: float32 [Cout].
        bits: Bits of the other channels.
        share: Share of the channels at each end, 0 to 0.5, rounded down.

    Returns:
        None if no channel can change: one bit more or less is not a valid weight width, or the share is less than one channel.
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
    for width in sorted(set(bits.tolist())):
        channels = bits == width
        scale[channels] = recipe.weight_scale(weight[channels], width)
    return scale


@torch.no_grad()
def mix_channel_bits(context: TrainingContext, recipe: Recipe, share: float) -> tuple[int, int]:
    """Mix the bits of each layer at the recipe's bits if that lowers the squared error of the layer's output.

    Args:
        context: A calibrated student, a teacher whose inputs the error is measured on, and a staggered pool. The pool's next samples are used and
            stay where they are.
        recipe: Searches the weight scales.
        share: Share of each layer's channels at each end.

    Returns:
        Number of layers changed, and number of layers considered.
    """
    student, teacher, trajectories = context.student, context.teacher, context.trajectories
    layers = {name: layer for name, layer in student.layers.items() if student.family.placement(name) == "quantize"}
    proposals: dict[str, tuple[Tensor, Tensor]] = {}

    def propose(name: str) -> None:
        weight = layers[name].merged_weight()
        bits = mixed_bits(kurtosis(weight), layers[name].bits, share)
        if bits is not None:
            proposals[name] = bits, scales_of(recipe, weight, bits)

    parallel_map(propose, layers)
    better: dict[str, bool] = {}

    def compare(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            layer, (bits, scale) = layers[name], proposals[name]
            x, weight = site_input(layer.layer, args[0].float()), layer.merged_weight()
            mixed = dequantize_weight(quantize_weight(weight, scale, bits), scale)
            uniform = dequantize_weight(*layer.codes())
            better[name] = bool(_power(layer, x, mixed - weight) < _power(layer, x, uniform - weight))

        return hook

    next_index = trajectories.next_index
    with input_hooks((teacher.model.get_submodule(name), compare(name)) for name in proposals):
        teacher(trajectories.next_batch(min(trajectories.size, 2 * trajectories.rows)).inputs)
    trajectories.next_index = next_index
    for name in (name for name, improved in better.items() if improved):
        bits, scale = proposals[name]
        layers[name].set_channel_bits(bits)
        layers[name].set_weight_scale(scale)
    return sum(better.values()), len(layers)


def _power(layer: StudentLayer, x: Tensor, error: Tensor) -> Tensor:
    """Squared output of a layer whose weight is `error`: a scalar."""
    if isinstance(layer.layer, nn.Linear):
        return functional.linear(x, error).square().sum()
    conv = layer.layer
    return functional.conv2d(x, error, None, conv.stride, conv.padding, conv.dilation, conv.groups).square().sum()
