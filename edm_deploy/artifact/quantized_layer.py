"""One quantized layer of an artifact: codes, scales, bits, and their invariants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import WEIGHT_BITS, channel_bounds, weight_bounds

Op = Literal["conv2d", "linear"]
RELAXED_BITS = 8  # bits of inputs at relaxed timesteps, where they are not in floating point there


@dataclass(frozen=True, kw_only=True)
class QuantizedLayer:
    """One quantized layer: `y = s_x[row] * s_w[o] * conv(n_x, n_w) + bias`.

    Always: every code lies within the bounds of `weight_bits`; weight_scale > 0 and finite.

    Attributes:
        op: `conv2d` or `linear`.
        codes: int8, the shape of the layer's weight [Cout, Cin, ...].
        weight_scale: float32 [Cout].
        weight_bits: 2 to 8.
        channel_bits: uint8 [Cout], bits of each output channel where they differ; `weight_bits` is then their nominal value.
        activation: Quantization of the input, or None where only the weight is quantized.
        relaxed_activation: Quantization of the input to 8 bits at the artifact's relaxed timesteps; None where `activation` is used there too, or
            where inputs are in floating point there.
    """

    op: Op
    codes: Tensor
    weight_scale: Tensor
    weight_bits: int
    activation: ActivationTable | None
    channel_bits: Tensor | None = None
    relaxed_activation: ActivationTable | None = None

    @property
    def scheme(self) -> str:
        """Bits in the usual notation, `W4A8`; A16 where the input stays in floating point."""
        return f"W{self.weight_bits}A{self.activation.bits if self.activation else 16}"

    def problem(self, weight_shape: tuple[int, ...], rows: int) -> str | None:
        """The violated invariant as a phrase, or None."""
        if tuple(self.codes.shape) != weight_shape:
            return f"codes have shape {list(self.codes.shape)}, the layer's weight {list(weight_shape)}"
        if tuple(self.weight_scale.shape) != weight_shape[:1]:
            return f"weight_scale has shape {list(self.weight_scale.shape)}, expected [{weight_shape[0]}]"
        if not bool((torch.isfinite(self.weight_scale) & (self.weight_scale > 0)).all()):
            return "weight_scale holds a value that is not finite and positive"
        return self._codes_problem() or (self.activation.problem(rows) if self.activation else None) or self._relaxed_problem(rows)

    def _relaxed_problem(self, rows: int) -> str | None:
        table = self.relaxed_activation
        if table is None:
            return None
        if self.activation is None or self.activation.bits >= RELAXED_BITS:
            return f"has a table of {RELAXED_BITS} bits for relaxed timesteps, expected none at {self.scheme}"
        problem = table.problem(rows)
        return problem and f"at relaxed timesteps, {problem}"

    def _codes_problem(self) -> str | None:
        if self.channel_bits is None:
            qmin, qmax = weight_bounds(self.weight_bits)
            lowest, highest = (int(edge) for edge in torch.aminmax(self.codes))
            return (
                f"codes reach [{lowest}, {highest}], outside [{qmin}, {qmax}] of {self.weight_bits} bits"
                if lowest < qmin or highest > qmax
                else None
            )
        if self.channel_bits.shape != self.weight_scale.shape:
            return f"channel_bits has shape {list(self.channel_bits.shape)}, expected {list(self.weight_scale.shape)}"
        if unknown := sorted(set(self.channel_bits.tolist()) - set(WEIGHT_BITS)):
            return f"channel_bits holds {unknown[0]}, expected {WEIGHT_BITS.start} to {WEIGHT_BITS.stop - 1}"
        extremes = torch.aminmax(self.codes.flatten(1), dim=1)
        low, high = channel_bounds(self.channel_bits)
        outside = (extremes.min < low) | (extremes.max > high)
        if not bool(outside.any()):
            return None
        channel = int(outside.int().argmax())
        found = f"[{int(extremes.min[channel])}, {int(extremes.max[channel])}]"
        return f"codes of output channel {channel} reach {found}, outside [{int(low[channel])}, {int(high[channel])}] of its {int(self.channel_bits[channel])} bits"
