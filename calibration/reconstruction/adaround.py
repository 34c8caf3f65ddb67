"""AdaRound: learned rounding of each weight up or down, initialized at its position between the two codes.

Source: Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, ICML 2020, arXiv 2004.10568, equations 21 to 25.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from calibration.student.layers import StudentLayer
from edm_deploy.network.restructure import weight_to_hold
from edm_deploy.numerics.codes import dequantize_weight, per_channel

# Source: ibid., section 3.2: the sigmoid is stretched, so that it reaches 0 and 1 and its gradient does not vanish near them.
ZETA, GAMMA = 1.1, -0.1
# Source: schedule of the released code: the exponent decreases from 20 to 2; there is no regularization in the first fifth of the steps.
START, END, WARMUP = 20.0, 2.0, 0.2


class AdaRound(nn.Module):
    """Learnable rounding of one layer's weight: `s * clip(floor(W / s) + h(V), qmin, qmax)`, h between 0 and 1.

    Always true: with `h` rounded to 0 or 1 each code is at most one from the nearest. Initially the result is W, clipped.

    Args:
        layer: Its current weight scale is used, and must not be trained meanwhile.

    Attributes:
        logits: float32, the shape of the weight: V.
    """

    floor: Tensor
    scale: Tensor
    lowest: Tensor
    highest: Tensor

    @torch.no_grad()
    def __init__(self, layer: StudentLayer) -> None:
        super().__init__()
        weight, scale = layer.merged_weight(), layer.log_weight_scale.exp()
        lowest, highest = layer.code_bounds()
        position = weight / per_channel(scale, weight)
        floor = position.floor()
        # Beyond the bounds the code does not depend on h; int8 holds one code more on either side.
        self.register_buffer("floor", floor.clamp(-128, 127).to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("lowest", per_channel(lowest, weight))
        self.register_buffer("highest", per_channel(highest, weight))
        self.logits = nn.Parameter(logits_of(position - floor))

    def up(self) -> Tensor:
        """h(V), float32 in [0, 1] of the weight's shape: 0 rounds down, 1 rounds up. Equation 23."""
        return rectified_sigmoid(self.logits)

    def forward(self) -> Tensor:
        """The softly quantized weight, float32: equation 22."""
        codes = torch.minimum(torch.maximum(self.floor + self.up(), self.lowest), self.highest)
        return codes * per_channel(self.scale, codes)

    def penalty(self, exponent: float) -> Tensor:
        """`sum(1 - |2 h - 1|^exponent)`, a scalar: 0 if every h is 0 or 1. Equation 24."""
        return (1 - (2 * self.up() - 1).abs().pow(exponent)).sum()

    @torch.no_grad()
    def codes(self) -> Tensor:
        """The codes with h rounded to 0 or 1, int8, the shape of the weight."""
        codes = self.floor.float() + (self.logits >= 0)  # h >= 0.5
        return torch.minimum(torch.maximum(codes, self.lowest), self.highest).to(torch.int8)


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """`clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)`: equation 23."""
    return (logits.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def logits_of(share: Tensor) -> Tensor:
    """The logits whose rectified sigmoid is `share`, float32 in [0, 1]."""
    return -torch.log((ZETA - GAMMA) / (share - GAMMA) - 1)


def exponent_at(share: float) -> float | None:
    """The regularizer's exponent after `share` of the training, 0 to 1; None during warm-up, without regularization."""
    if share < WARMUP:
        return None
    return END + (START - END) * (1 - (share - WARMUP) / (1 - WARMUP))


def begin(layers: Iterable[StudentLayer]) -> list[AdaRound]:
    """Start learned rounding of these layers; returns the rounding modules."""
    roundings = []
    for layer in layers:
        layer.rounding = AdaRound(layer)
        roundings.append(layer.rounding)
    return roundings


@torch.no_grad()
def commit(layers: Iterable[StudentLayer]) -> None:
    """Replace each layer's weight by its dequantized codes, which rounding to nearest preserves. Layers without learned rounding are not changed.

    The student's float weight is dropped; the teacher has its own.
    """
    for layer in layers:
        if isinstance(layer.rounding, AdaRound):
            weight = dequantize_weight(layer.rounding.codes(), layer.rounding.scale)
            weight = weight_to_hold(layer.layer, weight)  # the layer divides its weight by its pre-scale
            layer.layer.weight = nn.Parameter(weight.to(memory_format=_layout(layer.layer.weight)), requires_grad=False)
            layer.rounding = None


def _layout(weight: Tensor) -> torch.memory_format:
    channels_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format
