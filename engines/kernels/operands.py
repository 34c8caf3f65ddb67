"""The operands of the kernels and their checks. Kernels read raw pointers, so everything they rely on is checked here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.kernel_layout import CHUNK, bits_of, check_unsigned, code_bytes
from edm_deploy.runtime.capabilities import CAPABILITIES

FLOATS = (torch.float16, torch.bfloat16)
FILTERS = CAPABILITIES["cuda"].filters or ()
STRIDES = (1, 2)
LARGEST_ROW = 8192  # channels of a token that is normalized
INT32 = 2**31  # kernels count elements, and sum products, in int32
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", "geglu")  # in front of a quantizer; geglu: x * gelu(gate) of [..., 2C]
NORM_ACTIVATIONS = ("none", "silu")  # behind a group norm
LARGEST_ROTATION = 256  # channels of a block: an octet of each lane of a warp
LARGEST_CODE = {"s4": 8, "u4": 15, "s8": 128}  # magnitude of an activation as it is stored
LARGEST_WEIGHT = {"s4": 8, "u4": 8, "s8": 128}


@dataclass(frozen=True)
class Table:
    """Quantization of an activation at each table row, and the row of each sample.

    Attributes:
        rows: int32 [B].
        inv_scale: float32 [R].
        qmin, qmax: int32 [R].
        bits: 4 or 8, the width of a stored code.
        unsigned: Whether `n - qmin` is stored.
    """

    rows: Tensor
    inv_scale: Tensor
    qmin: Tensor
    qmax: Tensor
    bits: int
    unsigned: bool

    @property
    def columns(self) -> dict[str, Tensor]:
        """The tensors, as the structs of quantizers name them."""
        return {"row": self.rows, "inv_scale": self.inv_scale, "qmin": self.qmin, "qmax": self.qmax}

    def check(self, op: str, x: Tensor) -> None:
        """Raises InputError where the table does not match the activation `x` [B, ...]."""
        code_bytes(1, self.bits)
        if self.unsigned:
            check_unsigned(self.bits)
        column = [self.inv_scale.numel()]
        _expect(op, "rows", self.rows, torch.int32, [x.shape[0]], x.device)
        _expect(op, "inv_scale", self.inv_scale, torch.float32, column, x.device)
        _expect(op, "qmin", self.qmin, torch.int32, column, x.device)
        _expect(op, "qmax", self.qmax, torch.int32, column, x.device)


@dataclass(frozen=True)
class Norm:
    """Statistics float32 [B, groups] of a group norm, and its affine parameters float32 [C], each of which may be None."""

    mean: Tensor
    rstd: Tensor
    gamma: Tensor | None
    beta: Tensor | None

    def check(self, op: str, x: Tensor, channels: int, groups: int) -> None:
        """Raises InputError where the norm does not match the activation `x` with `channels` channels."""
        check_groups(op, channels, groups)
        for name, column in (("mean", self.mean), ("rstd", self.rstd)):
            _expect(op, name, column, torch.float32, [x.shape[0], groups], x.device)
        for name, per_channel in (("gamma", self.gamma), ("beta", self.beta)):
            if per_channel is not None:
                _expect(op, name, per_channel, torch.float32, [channels], x.device)


@dataclass(frozen=True)
class RowNorm:
    """LayerNorm or RMSNorm of each token, with adaLN's scale and shift: `((x - mean) * rstd * gamma + beta) * (1 + scale) + shift`.

    Attributes:
        gamma, beta: float32 [C] or None.
        scale, shift: [B, C] of x's type, or None.
        eps: Added to the variance.
        rms: Whether the mean is taken as 0.
    """

    gamma: Tensor | None
    beta: Tensor | None
    scale: Tensor | None
    shift: Tensor | None
    eps: float
    rms: bool

    def check(self, op: str, x: Tensor) -> None:
        """Raises InputError where the norm does not match the tokens `x` [B, ..., C], UnsupportedError where C is more than a block holds."""
        channels = x.shape[-1]
        if x.ndim == 4:
            raise InputError(f"{op}: x has shape {list(x.shape)}; expected tokens [B, ..., C], and not four axes.")
        if channels > LARGEST_ROW:
            raise UnsupportedError(f"{op}: {channels} channels; the kernel normalizes {LARGEST_ROW} at most. Keep this norm in torch.")
        check_eps(op, self.eps)
        for name, per_channel in (("gamma", self.gamma), ("beta", self.beta)):
            if per_channel is not None:
                _expect(op, name, per_channel, torch.float32, [channels], x.device)
        for name, per_sample in (("scale", self.scale), ("shift", self.shift)):
            if per_sample is not None:
                _expect(op, name, per_sample, x.dtype, [x.shape[0], channels], x.device, contiguous=False)


@dataclass(frozen=True)
class ConvShape:
    """Sizes of a convolution; a Linear is one with H = L, W = 1. Names as in `cuda/params.h`."""

    N: int
    H: int
    W: int
    Cb: int
    K: int
    R: int
    S: int
    P: int
    Q: int
    padding: int
    stride: int

    @property
    def M(self) -> int:  # noqa: N802  # as in params.h
        """Rows of the output as a matrix [M, K]."""
        return self.N * self.P * self.Q


@dataclass(frozen=True)
class Operands:
    """Operands of a convolution or a Linear of packed codes, in the order of the operators' arguments.

    Attributes:
        codes: uint8 [B, H, W, Cb].
        rows: int32 [B].
        weight: uint8 [K, R * S, Cb].
        zero: uint8 [R, 16].
        act_scale: float32 [R].
        qmin: int32 [R].
        weight_scale: float32 [K].
        weight_sum: int32 [K].
        bias: float32 [K] or None.
        sample_bias, gate: [B, K] of the output's type, or None: added behind the bias, and multiplied with the sum.
        residual: The output's type, or None: added behind the gate. [N, P, Q, K], or a Linear's output's shape, with any strides.
        saturate: Whether the result is clipped to float16's finite values.
        kind: `s4`, `u4` or `s8`.
    """

    codes: Tensor
    rows: Tensor
    weight: Tensor
    zero: Tensor
    act_scale: Tensor
    qmin: Tensor
    weight_scale: Tensor
    weight_sum: Tensor
    bias: Tensor | None
    sample_bias: Tensor | None
    gate: Tensor | None
    residual: Tensor | None
    saturate: bool
    kind: str

    def shape(self, op: str, kernel: Sequence[int], stride: int, padding: int) -> ConvShape:
        """The sizes.

        Raises:
            InputError: Codes or weight are not packed as in `numerics/kernel_layout.py`, do not match, or are smaller than the filter.
            UnsupportedError: No kernel is compiled for the filter or the stride, or a sum could exceed int32.
        """
        R, S = kernel
        if (R, S) not in FILTERS or stride not in STRIDES:
            known = ", ".join(f"{height}x{width}" for height, width in FILTERS)
            raise UnsupportedError(
                f"{op}: a {R}x{S} filter with stride {stride}; the kernels have {known} with stride 1 or 2. Keep this layer in floating point."
            )
        codes, weight = self.codes, self.weight
        if codes.ndim != 4 or codes.numel() == 0 or codes.shape[-1] % CHUNK:
            raise InputError(
                f"{op}: codes have shape {list(codes.shape)}; expected [B, H, W, Cb], Cb a multiple of {CHUNK}, none of them 0."
            )
        if weight.ndim != 3 or weight.numel() == 0:
            raise InputError(f"{op}: weight has shape {list(weight.shape)}; expected [K, R * S, Cb] as pack_weight returns it.")
        batch, height, width, stored = codes.shape
        _expect(op, "codes", codes, torch.uint8, codes.shape, codes.device)
        _expect(op, "weight", weight, torch.uint8, [weight.shape[0], R * S, stored], codes.device)
        P, Q = ((size + 2 * padding - taps) // stride + 1 for size, taps in ((height, R), (width, S)))
        if padding < 0 or height + 2 * padding < R or width + 2 * padding < S:
            raise InputError(f"{op}: a {R}x{S} filter with padding {padding} does not fit into a map of {height}x{width}.")
        products = R * S * stored * 8 // bits_of(self.kind)
        if products * LARGEST_CODE[self.kind] * LARGEST_WEIGHT[self.kind] >= INT32:
            raise UnsupportedError(
                f"{op}: a sum of {products} products of {self.kind} codes may exceed int32. Keep this layer in floating point."
            )
        return ConvShape(batch, height, width, stored, weight.shape[0], R, S, P, Q, padding, stride)

    def check(self, op: str, shape: ConvShape, result: Sequence[int], dtype: torch.dtype) -> None:
        """Raises InputError where a table, a per-channel operand or the residual does not match; `result` is the output's shape."""
        device, rows = self.codes.device, self.act_scale.numel()
        _expect(op, "rows", self.rows, torch.int32, [shape.N], device)
        _expect(op, "act_scale", self.act_scale, torch.float32, [rows], device)
        _expect(op, "qmin", self.qmin, torch.int32, [rows], device)
        _expect(op, "zero", self.zero, torch.uint8, [rows, CHUNK], device)
        _expect(op, "weight_scale", self.weight_scale, torch.float32, [shape.K], device)
        _expect(op, "weight_sum", self.weight_sum, torch.int32, [shape.K], device)
        if self.bias is not None:
            _expect(op, "bias", self.bias, torch.float32, [shape.K], device)
        if dtype not in FLOATS:
            raise InputError(f"{op}: output type {_words(dtype)}; the kernels write float16 and bfloat16.")
        for name, per_sample in (("sample_bias", self.sample_bias), ("gate", self.gate)):
            if per_sample is not None:
                _expect(op, name, per_sample, dtype, [shape.N, shape.K], device, contiguous=False)
        if self.residual is not None:
            _expect(op, "residual", self.residual, dtype, result, device, contiguous=False)


def check_values(op: str, x: Tensor) -> int:
    """Number of channels of a floating-point activation.

    Raises:
        InputError: It is not float16 or bfloat16, has fewer than two axes, or is empty.
    """
    if x.dtype not in FLOATS:
        raise InputError(f"{op}: x is {_words(x.dtype)}; the kernels read float16 and bfloat16. Run the model in one of them.")
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


def _expect(
    op: str, name: str, tensor: Tensor, dtype: torch.dtype, shape: Sequence[int], device: torch.device, *, contiguous: bool = True
) -> None:
    if tensor.dtype != dtype or tuple(tensor.shape) != tuple(shape) or tensor.device != device:
        raise InputError(
            f"{op}: {name} is {_words(tensor.dtype)} {list(tensor.shape)} on {tensor.device}; "
            f"expected {_words(dtype)} {list(shape)} on {device}."
        )
    if contiguous and not tensor.is_contiguous():
        raise InputError(f"{op}: {name} {list(tensor.shape)} has strides {list(tensor.stride())}. Call .contiguous() on it.")


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
