"""Checks of the operators' operands. Kernels read raw pointers, so everything they rely on is checked before a launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError

FLOATS = (torch.float16, torch.bfloat16)
INT32 = 2**31  # kernels count elements, and sum products, in int32
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")  # in front of a quantizer; geglu: x * gelu(gate) of [..., 2C]
NORM_ACTIVATIONS = ("none", "silu")  # behind a group norm
LARGEST_ROTATION = 256  # channels of a block: an octet of each lane of a warp


def check_values(op: str, x: Tensor) -> int:
    """Number of channels of a floating-point activation.

    Raises:
        InputError: It is not float16 or bfloat16, has fewer than two axes, or is empty.
    """
    if x.dtype not in FLOATS:
        raise InputError(f"{op}: x is {words(x.dtype)}; the kernels read float16 and bfloat16. Run the model in one of them.")
    if x.ndim < 2:
        raise InputError(f"{op}: x has shape {list(x.shape)}; expected [B, C, H, W], or [B, ..., C] with the channels last.")
    if x.numel() == 0:
        raise InputError(f"{op}: x is empty, {list(x.shape)}. Every axis needs at least one element.")
    return x.shape[1] if x.ndim == 4 else x.shape[-1]


def check_activation(op: str, x: Tensor, activation: str, known: Sequence[str] = ACTIVATIONS) -> None:
    """Raises InputError where the activation is not among `known`, or is `geglu` and x is a map or has an odd number of channels."""
    if activation not in known:
        raise InputError(f"{op}: activation {activation!r}; expected one of {', '.join(known)}.")
    if activation == "geglu" and (x.ndim == 4 or x.shape[-1] % 2):
        raise InputError(f"{op}: geglu of x {list(x.shape)}; expected [B, ..., 2C], values and gates, and not four axes.")


def check_rotation(op: str, x: Tensor, channels: int, rotation: int) -> None:
    """Raises InputError where x is a map, or a block of `rotation` channels is no power of two that divides `channels`, up to LARGEST_ROTATION; 0 is none."""
    if rotation == 0:
        return
    if x.ndim == 4:
        raise InputError(f"{op}: rotation of x {list(x.shape)}; expected tokens [B, ..., C], and not four axes.")
    if not (2 <= rotation <= LARGEST_ROTATION and rotation & (rotation - 1) == 0 and channels % rotation == 0):
        raise InputError(
            f"{op}: rotation in blocks of {rotation} of {channels} channels; expected a power of two that divides them, 2 to {LARGEST_ROTATION}."
        )


def check_eps(op: str, eps: float) -> None:
    """Raises InputError where eps is negative."""
    if eps < 0:
        raise InputError(f"{op}: eps {eps}; expected at least 0.")


def check_groups(op: str, channels: int, groups: int) -> None:
    """Raises InputError where the channels cannot be divided into `groups` equal groups."""
    if groups < 1 or channels % groups:
        raise InputError(f"{op}: {channels} channels do not fall into {groups} equal groups.")


def check_leading(op: str, codes: Tensor, leading: Sequence[int]) -> None:
    """Raises InputError where the axes before a Linear's channels do not match the number of vectors in its codes."""
    if len(leading) == 0 or leading[0] != codes.shape[0] or math.prod(leading) != codes.shape[0] * codes.shape[1] or codes.shape[2] != 1:
        raise InputError(
            f"{op}: codes [B, L, 1, Cb] are {list(codes.shape)}, which is not {list(leading)} vectors; leading must be [B, ...] of B * L in all."
        )


def check_size(op: str, **shapes: Sequence[int]) -> None:
    """Raises UnsupportedError where a tensor of one of these shapes has 2^31 elements or more."""
    for name, shape in shapes.items():
        if (count := math.prod(shape)) >= INT32:
            raise UnsupportedError(
                f"{op}: {name} {list(shape)} has {count} elements, the kernels count to {INT32 - 1}. Use a smaller batch."
            )


def check_rows(op: str, rows: Tensor, count: int) -> None:
    """Raises InputError where a row is not in a table of `count` rows; on the CPU only, because reading it would synchronize a GPU."""
    if rows.device.type == "cpu" and (int(rows.min()) < 0 or int(rows.max()) >= count):
        raise InputError(f"{op}: rows {rows.tolist()} reach beyond the table; expected 0 to {count - 1}.")


def expect(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device, *, contiguous: bool = True
) -> None:
    """Raises InputError where a tensor has another dtype, shape or device, or gaps though `contiguous` does not allow them."""
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        raise InputError(
            f"{op}: {name} is {words(tensor.dtype)} {list(tensor.shape)} on {tensor.device}; "
            f"expected {words(dtype)} {list(shape)} on {device}."
        )
    if contiguous and not tensor.is_contiguous():
        raise InputError(f"{op}: {name} {list(tensor.shape)} has strides {list(tensor.stride())}. Call .contiguous() on it.")


def words(dtype: torch.dtype) -> str:
    """A dtype as errors name it."""
    return str(dtype).removeprefix("torch.")
