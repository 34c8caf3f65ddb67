"""Calls of the operators drawn at random, for the emulator and for a GPU: shapes as networks have them, and odder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.numerics.kernel_layout import bits_of, pack_codes, pack_weight, weight_sum, zero_codes
from engines.kernels.checks import ACTIVATIONS, NORM_ACTIVATIONS
from engines.kernels.operands import Norm, Operands, RowNorm, Table

ROWS = 7
KINDS = ("s4", "u4", "s8")
TYPES = (torch.float16, torch.bfloat16)


class Dice:
    """Draws that repeat for a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def number(self, low: int, high: int) -> int:
        """An integer in [low, high]."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def one_of(self, values):
        return values[self.number(0, len(values) - 1)]

    def codes(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator, dtype=torch.int32)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


@dataclass
class Quantization:
    """Arguments of `quantize` or, with a norm, of `quantize_normed`."""

    x: Tensor
    norm: Norm | None
    table: Table
    activation: str
    rotation: int = 0

    def arguments(self, device: str) -> tuple:
        """Of the operator."""
        table, norm = self.table, self.norm
        columns = tuple(column.to(device) for column in (table.rows, table.inv_scale, table.qmin, table.qmax))
        tail = (*columns, table.bits, table.unsigned, self.activation, *(() if norm else (self.rotation,)))
        x = self.x.to(device)
        assert x.stride() == self.x.stride()
        if norm is None:
            return x, *tail
        affine = (None if part is None else part.to(device) for part in (norm.gamma, norm.beta))
        return x, norm.mean.to(device), norm.rstd.to(device), *affine, norm.mean.shape[1], *tail


def quantization(seed: int, largest: int) -> Quantization:
    """`largest` bounds each of height and width, and a tenth of the channels."""
    dice = Dice(seed)
    batch, groups = dice.number(1, 4), dice.number(1, 8)
    channels = groups * dice.number(1, max(1, 10 * largest // groups))
    size = [dice.number(1, largest), dice.number(1, largest)]
    layout = dice.one_of(("first", "last", "strided", "tokens", "vectors"))
    x = dice.normal(batch, channels, *size) * 3
    x[0, 0, 0, 0] = float("nan")
    if layout == "last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "strided":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "tokens":
        x = x.flatten(2).transpose(1, 2).contiguous()
    elif layout == "vectors":
        x = x[:, :, 0, 0].contiguous()
    norm = None
    if dice.number(0, 1):
        affine = [dice.normal(channels) if dice.number(0, 1) else None for _ in range(2)]
        norm = Norm(dice.normal(batch, groups), dice.normal(batch, groups).abs() + 0.1, *affine)
    table = table_of(dice, batch)
    activation = dice.one_of(NORM_ACTIVATIONS if norm else ACTIVATIONS)
    if activation == "geglu":
        x = torch.cat([x.flatten(2).transpose(1, 2) if x.ndim == 4 else x, dice.normal(*gates_of(x)) * 3], -1)
    rotation = 0 if norm or x.ndim == 4 else a_rotation(dice, channels)
    return Quantization(x.to(dice.one_of(TYPES)), norm, table, activation, rotation)


def a_rotation(dice: Dice, channels: int) -> int:
    """Channels of a block, the largest power of two that divides the channels or 0 for none."""
    block = min(channels & -channels, 256)
    return block if block > 1 and dice.number(0, 1) else 0


def table_of(dice: Dice, batch: int) -> Table:
    """Scales and bounds at every row, of signed or unsigned codes."""
    bits, unsigned = dice.one_of(((4, False), (4, True), (8, False)))
    qmin = dice.codes(-15, 0, ROWS) if unsigned else dice.codes(-8 if bits == 4 else -128, 0, ROWS)
    qmax = qmin + 15 if unsigned else dice.codes(0, 7 if bits == 4 else 127, ROWS)
    inv_scale = dice.normal(ROWS).abs() * (4 if bits == 4 else 40) + 0.1
    return Table(dice.codes(0, ROWS - 1, batch), inv_scale, qmin, qmax, bits, unsigned)


def gates_of(x: Tensor) -> list[int]:
    """Shape [B, ..., C] of the gates of an activation, a map read as tokens."""
    return [x.shape[0], x.shape[2] * x.shape[3], x.shape[1]] if x.ndim == 4 else list(x.shape)


@dataclass
class RowNormalization:
    """Arguments of `quantize_row_normed`."""

    x: Tensor
    norm: RowNorm
    table: Table
    rotation: int

    def arguments(self, device: str) -> tuple:
        """Of the operator."""
        values = (self.x, *vars(self.norm).values(), *vars(self.table).values(), self.rotation)
        return tuple(value.to(device) if isinstance(value, Tensor) else value for value in values)


def row_normalization(seed: int, largest: int) -> RowNormalization:
    """`largest` bounds the number of tokens, and a hundredth of the channels."""
    dice = Dice(seed)
    batch, channels, dtype = dice.number(1, 4), dice.number(1, 100 * largest), dice.one_of(TYPES)
    if dice.number(0, 1):
        channels = -(-channels // 8) * 8
    x = dice.normal(batch, *[dice.number(1, largest) for _ in range(dice.number(0, 1))], channels) * 3 + dice.one_of((0, 20))
    projection = dice.normal(batch, 6 * channels).to(dtype)
    pieces = projection.chunk(6, dim=1) if dice.number(0, 1) else projection.view(batch, -1, 6).unbind(-1)
    affine = [dice.normal(channels) if dice.number(0, 1) else None for _ in range(2)]
    ada = [piece if dice.number(0, 1) else None for piece in pieces[2:4]]
    norm = RowNorm(*affine, *ada, 1e-6, bool(dice.number(0, 1)))
    return RowNormalization(x.to(dtype), norm, table_of(dice, batch), a_rotation(dice, channels))


@dataclass
class Sum:
    """Arguments of `conv2d`, or of `linear` where `leading` is set."""

    operands: Operands
    kernel: int
    stride: int
    padding: int
    leading: list[int] | None
    dtype: torch.dtype

    def arguments(self, device: str) -> tuple:
        """Of the operator."""
        values = [value.to(device) if isinstance(value, Tensor) else value for value in vars(self.operands).values()]
        if self.leading is not None:
            return *values, self.leading, self.dtype
        return *values, [self.kernel, self.kernel], self.stride, self.padding, self.dtype


def a_sum(seed: int, largest: int) -> Sum:
    """`largest` bounds each of height and width, and a tenth of the channels in and out."""
    dice = Dice(seed)
    kind, dtype, linear = dice.one_of(KINDS), dice.one_of(TYPES), dice.number(0, 3) == 0
    bits = bits_of(kind)
    limit = 1 << (bits - 1)
    batch, channels, outputs = dice.number(1, 4), dice.number(1, 10 * largest), dice.number(1, 10 * largest)
    if dice.number(0, 1):
        outputs = -(-outputs // 8) * 8
    kernel, stride, padding = (1, 1, 0) if linear else (dice.one_of((1, 2, 3, 3)), dice.number(1, 2), dice.number(0, 1))
    height, width = dice.number(kernel, largest + kernel), 1 if linear else dice.number(kernel, largest + kernel)
    P, Q = ((size + 2 * padding - kernel) // stride + 1 for size in (height, width))
    qmin = dice.codes(-15, 0, ROWS) if kind == "u4" else torch.full((ROWS,), -limit, dtype=torch.int32)
    stored = (
        dice.codes(0, 15, batch, height, width, channels) if kind == "u4" else dice.codes(-limit, limit - 1, batch, height, width, channels)
    )
    weight = dice.codes(-limit, limit - 1, outputs, channels, kernel, kernel).to(torch.int8)
    leading = [batch, height] if linear else None
    shape = (*leading, outputs) if leading else (batch, outputs, P, Q)
    projection = (dice.normal(batch, 3 * outputs) * dice.one_of((1, 1, 3e4))).to(dtype)  # sometimes beyond float16's range
    sample_bias, gate = (piece if dice.number(0, 1) else None for piece in projection.chunk(3, dim=1)[1:])
    operands = Operands(
        codes=pack_codes(stored, bits),
        rows=dice.codes(0, ROWS - 1, batch),
        weight=pack_weight(weight, bits),
        zero=zero_codes(qmin, bits, unsigned=kind == "u4"),
        act_scale=dice.normal(ROWS).abs() * 0.1 + 0.01,
        qmin=qmin,
        weight_scale=dice.normal(outputs).abs() * 0.01 + 0.001,
        weight_sum=weight_sum(weight),
        bias=dice.normal(outputs) if dice.number(0, 1) else None,
        sample_bias=sample_bias,
        gate=gate,
        saturate=bool(dice.number(0, 1)),
        residual=dice.normal(*shape).to(dtype) if dice.number(0, 1) else None,
        low=None,
        up=None,
        kind=kind,
    )
    return Sum(operands, kernel, stride, padding, leading, dtype)


def statistics(seed: int, largest: int) -> tuple[Tensor, int, float]:
    """x far from 0, groups and eps of `group_stats`."""
    dice = Dice(seed)
    groups = dice.number(1, 8)
    channels = groups * dice.number(1, 12)
    x = dice.normal(dice.number(1, 3), channels, dice.number(2, largest), dice.number(2, largest)) * 3 + 10
    x = x.to(memory_format=torch.channels_last) if dice.number(0, 1) else x
    return x.to(dice.one_of(TYPES)), groups, 1e-5
