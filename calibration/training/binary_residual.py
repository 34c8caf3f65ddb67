"""Binary residual on salient output channels: `W ~ s n + alpha sign(W - s n)`, on a grid of int8 codes, so that a layer remains one integer product.

Source: MPQ-DMv2, arXiv 2507.04290, without released code: a binary residual branch on salient channels. alpha as in XNOR-Net, Rastegari et al.,
arXiv 1603.05279, equation 6.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from calibration.student.layers import StudentLayer
from edm_deploy.network.restructure import weight_to_hold
from edm_deploy.numerics.codes import per_channel, weight_bounds

LARGEST = weight_bounds(8)[1]
FIRST_BITS = range(2, 7)  # bits of the first term for which a second term fits into int8


class BinaryResidual(nn.Module):
    """Weight rounding of one layer whose salient channels have a second, binary term during training.

    alpha is the channel's mean |W - s n|, which minimizes the squared error, rounded to a multiple of s / k; k is the largest value for which the
    codes `k n + j sign` stay within [-127, 127].

    Args:
        layer: The layer; its weight, update and scale may be trained meanwhile.
        salient: Whether each output channel has the second term, [Cout]. Channels of 7 and 8 bits never have it.

    Attributes:
        salient: uint8 [Cout]. A parameter, so that checkpoints contain it.
    """

    def __init__(self, layer: StudentLayer, salient: Tensor) -> None:
        super().__init__()
        self._layer = (layer,)  # in a tuple, because this module is a submodule of the layer and not the reverse
        self.salient = nn.Parameter(salient.to(layer.log_weight_scale.device, torch.uint8), requires_grad=False)

    def forward(self) -> Tensor:
        """The quantized weight, float32."""
        (layer,) = self._layer
        nearest = layer.nearest_weight()
        error = (layer.merged_weight() - nearest).detach()
        alpha = self.steps(error) * layer.log_weight_scale.exp() / self.fineness()
        return nearest + per_channel(alpha, error) * error.sign()

    def fineness(self) -> Tensor:
        """k: float32 [Cout], the number of grid points per step of the first term; 1 where there is no second term."""
        (layer,) = self._layer
        lowest, _ = layer.code_bounds()
        allowed = [
            grid_points(int(-bound)) if salient else 1 for bound, salient in zip(lowest.tolist(), self.salient.tolist(), strict=True)
        ]
        return torch.tensor(allowed, dtype=torch.float32, device=lowest.device)

    @torch.no_grad()
    def steps(self, error: Tensor) -> Tensor:
        """J = alpha k / s, rounded: float32 [Cout], from the error of the first term, float32 [Cout, ...]."""
        (layer,) = self._layer
        fine = self.fineness()
        alpha = error.flatten(1).abs().mean(1)
        return (alpha * fine / layer.log_weight_scale.exp()).round().minimum((fine / 2).floor())


def grid_points(largest: int) -> int:
    """The largest k for which `k * largest + k // 2` is a code: 15 for codes down to -8."""
    points = LARGEST // largest
    while points > 1 and points * largest + points // 2 > LARGEST:
        points -= 1
    return max(points, 1)


@torch.no_grad()
def commit(layers: Iterable[StudentLayer]) -> int:
    """Merge both terms into one code per weight: salient channels get 8 bits and the finer scale; updates are merged. Returns the number of such channels."""
    channels = 0
    for layer in layers:
        residual = layer.rounding
        if not isinstance(residual, BinaryResidual):
            continue
        weight, fine = residual(), residual.fineness()
        layer.rounding = layer.lora_a = layer.lora_b = None
        if bool((fine > 1).any()):
            bits = torch.full_like(fine, layer.bits, dtype=torch.uint8) if layer.channel_bits is None else layer.channel_bits
            layer.set_channel_bits(torch.where(fine > 1, 8, bits))
            layer.set_weight_scale(layer.log_weight_scale.exp() / fine)
        weight = weight_to_hold(layer.layer, weight)  # the layer divides its weight by its pre-scale
        layer.layer.weight = nn.Parameter(weight, requires_grad=False)
        channels += int((fine > 1).sum())
    return channels
