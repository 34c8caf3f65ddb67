"""The operands of the kernels, and what each of them must match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.kernel_layout import CHUNK, bits_of, check_unsigned, code_bytes
from edm_deploy.runtime.capabilities import CAPABILITIES
from engines.kernels.checks import FLOATS, INT32, check_eps, check_groups, expect, words
from engines.kernels.launch import OCTET

FILTERS = CAPABILITIES["cuda"].filters or ()
STRIDES = (1, 2)
LARGEST_ROW = 8192  # channels of a token that is normalized
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
        expect(op, "rows", self.rows, torch.int32, [x.shape[0]], x.device)
        expect(op, "inv_scale", self.inv_scale, torch.float32, column, x.device)
        expect(op, "qmin", self.qmin, torch.int32, column, x.device)
        expect(op, "qmax", self.qmax, torch.int32, column, x.device)


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
            expect(op, name, column, torch.float32, [x.shape[0], groups], x.device)
        for name, per_channel in (("gamma", self.gamma), ("beta", self.beta)):
            if per_channel is not None:
                expect(op, name, per_channel, torch.float32, [channels], x.device)


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
                expect(op, name, per_channel, torch.float32, [channels], x.device)
        for name, per_sample in (("scale", self.scale), ("shift", self.shift)):
            if per_sample is not None:
                expect(op, name, per_sample, x.dtype, [x.shape[0], channels], x.device, contiguous=False)


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
        low, up: A low-rank branch, which is added before the bias: the layer's input times its first matrix, in the residual's shape with `rank`
            channels, and its second matrix [K, rank], of the output's type, rank a multiple of 8. Both or neither is None.
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
    low: Tensor | None
    up: Tensor | None
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
        expect(op, "codes", codes, torch.uint8, codes.shape, codes.device)
        expect(op, "weight", weight, torch.uint8, [weight.shape[0], R * S, stored], codes.device)
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
        expect(op, "rows", self.rows, torch.int32, [shape.N], device)
        expect(op, "act_scale", self.act_scale, torch.float32, [rows], device)
        expect(op, "qmin", self.qmin, torch.int32, [rows], device)
        expect(op, "zero", self.zero, torch.uint8, [rows, CHUNK], device)
        expect(op, "weight_scale", self.weight_scale, torch.float32, [shape.K], device)
        expect(op, "weight_sum", self.weight_sum, torch.int32, [shape.K], device)
        if self.bias is not None:
            expect(op, "bias", self.bias, torch.float32, [shape.K], device)
        if dtype not in FLOATS:
            raise InputError(f"{op}: output type {words(dtype)}; the kernels write float16 and bfloat16.")
        for name, per_sample in (("sample_bias", self.sample_bias), ("gate", self.gate)):
            if per_sample is not None:
                expect(op, name, per_sample, dtype, [shape.N, shape.K], device, contiguous=False)
        if self.residual is not None:
            expect(op, "residual", self.residual, dtype, result, device, contiguous=False)
        self._check_branch(op, shape, result, dtype)

    def _check_branch(self, op: str, shape: ConvShape, result: Sequence[int], dtype: torch.dtype) -> None:
        if self.low is None and self.up is None:
            return
        if self.low is None or self.up is None:
            raise InputError(f"{op}: a branch has two operands, low and up; only {'up' if self.low is None else 'low'} is given.")
        rank = self.up.shape[-1]
        if rank % OCTET or rank == 0:
            raise InputError(f"{op}: a branch of rank {rank}; expected a multiple of {OCTET}. Fill both of its matrices up with zeros.")
        expect(op, "up", self.up, dtype, [shape.K, rank], self.codes.device)
        axis = 1 if len(result) == 4 and op == "conv2d" else len(result) - 1
        expect(
            op,
            "low",
            self.low,
            dtype,
            [rank if at == axis else size for at, size in enumerate(result)],
            self.codes.device,
            contiguous=False,
        )
