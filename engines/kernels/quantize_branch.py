"""Quantize the input of layers that have a low-rank branch, and multiply it by the branch's first matrix, while it is read once.

Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2. The second product is in the epilogue of the layer (`operands.Operands.low`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.kernel_layout import code_bytes
from engines.kernels import driver, torch_ops
from engines.kernels.checks import check_activation, check_rotation, check_rows, check_size, check_values, expect
from engines.kernels.cuda_ops import TYPE_NAMES, aligned, unit_stride
from engines.kernels.launch import OCTET, PROLOGUES, BranchParams, branch_launch, row_lanes
from engines.kernels.operands import Norm, RowNorm, Table

LARGEST_RANK = 256
NORMS = ("none", "group", "layer", "rms")  # in front of the activation: none, with statistics of groups, of each token
SCHEMA = (
    "(Tensor x, Tensor rows, Tensor inv_scale, Tensor qmin, Tensor qmax, int bits, bool unsigned_codes, str activation, int rotation, "
    "Tensor down, Tensor? low_scale, bool low_rotated, str norm, Tensor? mean, Tensor? rstd, Tensor? gamma, Tensor? beta, Tensor? scale, Tensor? shift, "
    "int groups, float eps) -> (Tensor, Tensor)"
)


@dataclass(frozen=True)
class BranchOperands:
    """Operands of `quantize_branch`, in the order of its arguments behind the table.

    Attributes:
        activation, rotation: As of `quantize`.
        down: The branch's first matrix [rank, C], of x's type, the rank a multiple of 8.
        low_scale: [B, rank] of x's type, by which the product is multiplied, or None.
        low_rotated: Whether the branch multiplies the rotated values.
        norm: From NORMS.
        mean, rstd: Of `group`, float32 [B, groups].
        gamma, beta, scale, shift: As of `quantize_normed` and `quantize_row_normed`.
        groups: Of `group`.
        eps: Of `layer` and `rms`.
    """

    activation: str
    rotation: int
    down: Tensor
    low_scale: Tensor | None
    low_rotated: bool
    norm: str
    mean: Tensor | None
    rstd: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    groups: int
    eps: float

    @property
    def rank(self) -> int:
        """Columns of the product."""
        return self.down.shape[0]

    @property
    def group_norm(self) -> Norm | None:
        """The norm, where it is one of groups."""
        if self.norm != "group" or self.mean is None or self.rstd is None:
            return None
        return Norm(self.mean, self.rstd, self.gamma, self.beta)

    @property
    def row_norm(self) -> RowNorm | None:
        """The norm, where it is one of tokens."""
        if self.norm not in ("layer", "rms"):
            return None
        return RowNorm(self.gamma, self.beta, self.scale, self.shift, self.eps, self.norm == "rms")

    def check(self, x: Tensor) -> int:
        """Number of channels of x that are quantized.

        Raises:
            InputError: An operand does not match x, or no prologue has this norm and activation.
            UnsupportedError: The rank or the number of channels has no kernel.
        """
        op, channels = "quantize_branch", check_values("quantize_branch", x)
        if x.ndim == 4:
            raise InputError(f"{op}: x has shape {list(x.shape)}; expected tokens [B, ..., C], and not four axes.")
        check_activation(op, x, self.activation)
        channels = channels // 2 if self.activation == "geglu" else channels
        check_rotation(op, x, channels, self.rotation)
        if self.norm not in NORMS or (self.norm == "group") != (self.group_norm is not None) or self.prologue is None:
            raise InputError(
                f"{op}: norm {self.norm!r} with activation {self.activation!r}; no kernel has these, or its statistics are missing."
            )
        if channels % OCTET or self.rank % OCTET or not 0 < self.rank <= LARGEST_RANK:
            raise UnsupportedError(
                f"{op}: {channels} channels and rank {self.rank}; the kernel has multiples of {OCTET}, a rank of {LARGEST_RANK} at most. "
                "Multiply in torch."
            )
        expect(op, "down", self.down, x.dtype, [self.rank, channels], x.device)
        if self.low_scale is not None:
            expect(op, "low_scale", self.low_scale, x.dtype, [x.shape[0], self.rank], x.device, contiguous=False)
        if self.group_norm is not None:
            self.group_norm.check(op, x, channels, self.groups)
        if self.row_norm is not None:
            self.row_norm.check(op, x)
        return channels

    @property
    def prologue(self) -> str | None:
        """As kernels name it; None where no kernel has it."""
        if self.norm in ("layer", "rms"):
            return "rows" if self.activation == "none" else None
        return PROLOGUES.get((self.norm == "group", self.activation))


def quantize_branch(traced: bool, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Codes [B, L, 1, Cb] as of `quantize`, and the product [B, ..., rank] of what is quantized with the branch's first matrix."""
    table, operands = Table(*arguments[:6]), BranchOperands(*arguments[6:])
    channels = operands.check(x)
    table.check("quantize_branch", x)
    shapes = [x.shape[0], math.prod(x.shape[1:-1]), 1, code_bytes(channels, table.bits)], [*x.shape[:-1], operands.rank]
    if traced:
        return x.new_empty(shapes[0], dtype=torch.uint8), x.new_empty(shapes[1])
    check_size("quantize_branch", x=x.shape, codes=shapes[0], low=shapes[1])
    check_rows("quantize_branch", table.rows, len(table.inv_scale))
    codes, low = (on_cuda if x.is_cuda else on_cpu)(x, operands, table)
    return codes.view(shapes[0]), low.view(shapes[1])


def on_cpu(x: Tensor, operands: BranchOperands, table: Table) -> tuple[Tensor, Tensor]:
    """In plain torch; the product is summed in another order than on a GPU."""
    values = torch_ops.pixels(x).float()
    if (group_norm := operands.group_norm) is not None:
        values = torch_ops.normed(values, group_norm)
    if (row_norm := operands.row_norm) is not None:
        values = torch_ops.row_normed(values, row_norm)
    values = torch_ops.activated(values, operands.activation)
    rotated = torch_ops.rotated(values, operands.rotation)
    low = (rotated if operands.low_rotated else values).to(x.dtype).float() @ operands.down.float().T
    if operands.low_scale is not None:
        low = low * operands.low_scale.float()[:, None, None]
    return torch_ops.codes_of(rotated, table), low.to(x.dtype)


def on_cuda(x: Tensor, operands: BranchOperands, table: Table) -> tuple[Tensor, Tensor]:
    """As `on_cpu`, by one kernel."""
    values = torch_ops.pixels(x).contiguous()
    values, down = aligned(values), aligned(operands.down)
    batch, tokens, _, _ = values.shape
    channels, rank = operands.down.shape[1], operands.rank
    codes = torch.empty((batch, tokens, 1, code_bytes(channels, table.bits)), dtype=torch.uint8, device=x.device)
    low = torch.empty((batch, tokens, rank), dtype=x.dtype, device=x.device)
    per_sample = {name: unit_stride(getattr(operands, name)) for name in ("scale", "shift", "low_scale")}
    tensors = {
        "x": values,
        "codes": codes,
        "low": low,
        "down": down,
        **table.columns,
        **per_sample,
        **{name: getattr(operands, name) for name in ("mean", "rstd", "gamma", "beta")},
    }
    params = BranchParams(
        **{name: None if tensor is None else tensor.data_ptr() for name, tensor in tensors.items()},
        **{f"{name}_stride": 0 if tensor is None else tensor.stride(0) for name, tensor in per_sample.items()},
        N=batch,
        HW=tokens,
        C=channels,
        Cb=codes.shape[-1],
        groups=operands.groups,
        unsigned_codes=table.unsigned,
        rotation=operands.rotation,
        low_rotated=operands.low_rotated,
        lanes=row_lanes(channels) if operands.row_norm else 0,
        rms=operands.norm == "rms",
        rank=rank,
        eps=operands.eps,
    )
    type_name = TYPE_NAMES[x.dtype]
    driver.launch([branch_launch(params, type_name=type_name, bits=table.bits, prologue=str(operands.prologue))], x.device)
    return codes, low
