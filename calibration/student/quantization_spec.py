"""Bit widths and quantization ranges of one layer."""

from __future__ import annotations

from dataclasses import dataclass

from edm_deploy.numerics.codes import symmetric_bounds


@dataclass(frozen=True)
class LayerSpec:
    """Bit widths of one site.

    Attributes:
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or None if the input stays in floating point.
        symmetric: Whether the activation bounds are fixed and symmetric; otherwise the range may be any that contains 0.
    """

    weight_bits: int
    act_bits: int | None
    symmetric: bool

    @property
    def levels(self) -> int:
        """Number of activation codes minus one."""
        if self.act_bits is None or self.act_bits == 8 or not self.symmetric:
            return (1 << (self.act_bits or 8)) - 1
        return 2 * symmetric_bounds(self.act_bits)[1]

    @property
    def fixed_qmin(self) -> int | None:
        """The lowest activation code if the bounds are fixed, else None. At 8 bit that of int8, so that a graph needs no Clip."""
        if not self.symmetric or self.act_bits is None:
            return None
        return -128 if self.act_bits == 8 else symmetric_bounds(self.act_bits)[0]


W8A8 = LayerSpec(weight_bits=8, act_bits=8, symmetric=True)


@dataclass(frozen=True)
class QuantRange:
    """Quantization of one table row: `n = clip(round(x / scale), qmin, qmin + levels)`; scale > 0, qmin <= 0."""

    scale: float
    qmin: int
