"""Activation tables: a scale and a pair of bounds per table row, and the map from timesteps to rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ActivationTable:
    """Quantization of one site's input at each table row r: `n = clip(round(x * inv_scale[r]), qmin[r], qmax[r])`, `x ~ n * scale[r]`.

    Always true: scale > 0 and finite; qmin <= 0 <= qmax, both in [-128, 127]; qmax - qmin <= 2^bits - 1. Code 0 is therefore real 0.

    Attributes:
        bits: 3 to 8.
        scale: float32 [R].
        qmin: int8 [R].
        qmax: int8 [R].
    """

    bits: int
    scale: Tensor
    qmin: Tensor
    qmax: Tensor

    @property
    def inv_scale(self) -> Tensor:
        """The reciprocal of the scale, float32 [R], by which every executor multiplies."""
        return reciprocal(self.scale)

    @property
    def is_constant(self) -> bool:
        """Whether all rows are equal, so that the graph needs no lookup."""
        return all(bool((column == column[0]).all()) for column in (self.scale, self.qmin, self.qmax))

    def equals(self, other: ActivationTable) -> bool:
        """Whether both tables have equal scales and bounds at every row."""
        pairs = ((self.scale, other.scale), (self.qmin, other.qmin), (self.qmax, other.qmax))
        return all(torch.equal(a, b) for a, b in pairs)

    def at_rows(self, rows: Tensor) -> ActivationTable:
        """The table of some rows, int64 [N]."""
        return replace(self, scale=self.scale[rows], qmin=self.qmin[rows], qmax=self.qmax[rows])

    def problem(self, rows: int) -> str | None:
        """The violated invariant, as a phrase, or None. `rows` is the number of table rows of the artifact."""
        for name, column in (("act_scale", self.scale), ("act_qmin", self.qmin), ("act_qmax", self.qmax)):
            if tuple(column.shape) != (rows,):
                shapes = f"{name} has shape {list(column.shape)}, expected [{rows}]"
                per_channel = "; a scale for each input channel fits no integer kernel, put what they differ by into the layer's pre_scale"
                return shapes + (per_channel if column.ndim > 1 else "")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            return "act_scale holds a value that is not finite and positive"
        qmin, qmax = self.qmin.int(), self.qmax.int()
        if bool((qmin > 0).any()) or bool((qmax < 0).any()):
            return "bounds exclude code 0; expected qmin <= 0 <= qmax"
        if bool((qmax - qmin > 2**self.bits - 1).any()):
            return f"bounds span {int((qmax - qmin).max()) + 1} codes, more than the {2**self.bits} of {self.bits} bits"
        return None


def reciprocal(scale: Tensor) -> Tensor:
    """`float32(1 / scale)`, in the shape of `scale`. Every executor multiplies by this number, so that their codes can be compared."""
    return (1.0 / scale.double()).float()


def quantize_activation(x: Tensor, table: ActivationTable, rows: Tensor) -> Tensor:
    """Quantize a site's input, each sample at its row.

    Args:
        x: float32 [B, ...].
        table: The site's table, on the device of `x`.
        rows: int64 [B].

    Returns:
        Codes, float32 [B, ...]: rounded half to even, then clipped to the bounds.
    """
    inv_scale, qmin, qmax = (per_sample(column, rows, x) for column in (table.inv_scale, table.qmin, table.qmax))
    return torch.minimum(torch.maximum((x * inv_scale).round_(), qmin), qmax)


def per_sample(column: Tensor, rows: Tensor, like: Tensor) -> Tensor:
    """`column[rows]` as float32 [B, 1, ...], which broadcasts over `like` [B, ...]."""
    return column[rows].float().reshape(-1, *[1] * (like.ndim - 1))


def nearest_rows(timesteps: Sequence[int] | Tensor, num_train_timesteps: int) -> Tensor:
    """Row of the nearest calibrated timestep, for every timestep; of two at equal distance, the smaller one.

    Args:
        timesteps: The calibrated timesteps [R], ascending, unique, in [0, num_train_timesteps).
        num_train_timesteps: Length of the training schedule.

    Returns:
        int32 [num_train_timesteps].
    """
    calibrated = torch.as_tensor(timesteps, dtype=torch.int64)
    distance = (torch.arange(num_train_timesteps)[:, None] - calibrated[None, :]).abs()
    return distance.argmin(dim=1).to(torch.int32)


def table_rows(row_of_timestep: Tensor, timesteps: Tensor) -> Tensor:
    """Table rows of a batch of timesteps, which are rounded (those of Euler and flow matching are fractional) and clipped to the schedule.

    Args:
        row_of_timestep: int32 [num_train_timesteps].
        timesteps: any dtype [B].

    Returns:
        int64 [B].
    """
    index = timesteps.double().round().clamp(0, len(row_of_timestep) - 1).long()
    return row_of_timestep.to(index.device)[index].long()
