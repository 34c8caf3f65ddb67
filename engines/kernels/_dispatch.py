"""From operands on a GPU to launches: entry points, tiles and outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from edm_deploy.errors import UnsupportedError
from engines.kernels._checks import ConvShape, Norm, Operands, Table


def quantize(x: Tensor, norm: Norm | None, table: Table, *, silu: bool) -> Tensor:
    """As `_arithmetic.quantize`, on the GPU."""
    raise UnsupportedError("The kernels cannot be launched yet.")


def group_stats(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """As `_arithmetic.group_stats`, on the GPU."""
    raise UnsupportedError("The kernels cannot be launched yet.")


def convolve(operands: Operands, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """As `_arithmetic.convolve`, on the GPU."""
    raise UnsupportedError("The kernels cannot be launched yet.")
