"""The kernels as torch operators, `torch.ops.edm_deploy.*`, for use with torch.export, torch.compile and CUDA graphs.

Importing this file registers them; it requires torch only. On CUDA tensors they launch kernels on the current stream (`cuda_ops.py`), on CPU tensors they
compute the same bits in plain torch (`torch_ops.py`), and under a tracer only shapes. All share the checks in `checks.py` and `operands.py`.

    quantize          float16 or bfloat16 -> packed codes, optionally after an activation (checks.ACTIVATIONS), and a rotation in blocks of channels
    group_stats       mean and 1 / sqrt(variance + eps) of each sample's groups of channels
    quantize_normed   as quantize, after normalization with such statistics
    quantize_row_normed  as quantize, after LayerNorm or RMSNorm of each token, and per-sample scale and shift; then a rotation
    quantize_branch   as these three, and the product with the first matrix of a low-rank branch -> codes, [*leading, rank]
    rotary            rotary position embedding of queries or keys
    conv2d            packed codes * packed weight -> float16 or bfloat16 [B, K, P, Q], channels last
    linear            the same for a Linear -> [*leading, K]
    attention_s8      attention without a mask, queries and keys rounded to 8 bits -> [B, H, Lq, D], a view of [B, Lq, H, D]

An activation is a map [B, C, H, W], or [B, ..., C] of 2, 3 or more than 4 axes; four axes are always a map, so a Linear's [B, X, Y, C] goes in as
[B, X * Y, C]. Channels last is read without a copy, and so is a contiguous map by `quantize`; other layouts are copied. Packed codes, weights and tables must be
contiguous. `rows` is int32 [B], the table row of each sample, read from device memory, so that a CUDA graph replays with its current content; on CUDA
it is not checked against the table. `unsigned_codes` stores `n - qmin`, which a convolution of kind `u4` expects.

Raises InputError for operands that do not fit, UnsupportedError for what no kernel supports (see `checks.py`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edm_deploy.numerics.kernel_layout import code_bytes
from engines.kernels import cuda_ops, quantize_branch, rotary, torch_ops
from engines.kernels.attention import cpu as cpu_attention
from engines.kernels.attention import cuda as cuda_attention
from engines.kernels.attention.operands import AttentionOperands
from engines.kernels.checks import (
    NORM_ACTIVATIONS,
    check_activation,
    check_eps,
    check_groups,
    check_leading,
    check_rotation,
    check_rows,
    check_size,
    check_values,
)
from engines.kernels.operands import ConvShape, Norm, Operands, RowNorm, Table

_TABLE = "Tensor rows, Tensor inv_scale, Tensor qmin, Tensor qmax, int bits, bool unsigned_codes"
_OPERANDS = (
    "Tensor codes, Tensor rows, Tensor weight, Tensor zero, Tensor act_scale, Tensor qmin, Tensor weight_scale, Tensor weight_sum, "
    "Tensor? bias, Tensor? sample_bias, Tensor? gate, Tensor? residual, Tensor? low, Tensor? up, bool saturate, str kind"
)
_COUNT = _OPERANDS.count(",") + 1
SCHEMAS = {
    "quantize": f"(Tensor x, {_TABLE}, str activation, int rotation) -> Tensor",
    "group_stats": "(Tensor x, int groups, float eps) -> (Tensor, Tensor)",
    "quantize_normed": f"(Tensor x, Tensor mean, Tensor rstd, Tensor? gamma, Tensor? beta, int groups, {_TABLE}, str activation) -> Tensor",
    "quantize_row_normed": f"(Tensor x, Tensor? gamma, Tensor? beta, Tensor? scale, Tensor? shift, float eps, bool rms, {_TABLE}, int rotation) -> Tensor",
    "quantize_branch": quantize_branch.SCHEMA,
    "rotary": rotary.SCHEMA,
    "conv2d": f"({_OPERANDS}, int[2] kernel, int stride, int padding, ScalarType dtype) -> Tensor",
    "linear": f"({_OPERANDS}, SymInt[] leading, ScalarType dtype) -> Tensor",
    "attention_s8": "(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor",
}


_ON_CPU: ContextVar[Any] = ContextVar("on_cpu", default=torch_ops)


@contextlib.contextmanager
def implemented_by(functions: Any) -> Iterator[None]:
    """Within it, and in this thread, operators on CPU tensors call these functions, those of `torch_ops.py` by the same names."""
    token = _ON_CPU.set(functions)
    try:
        yield
    finally:
        _ON_CPU.reset(token)


def _implementation(x: Tensor) -> Any:
    return cuda_ops if x.is_cuda else _ON_CPU.get()


def codes_shape(x: Tensor, bits: int, activation: str) -> list[int]:
    """[B, H, W, Cb] of the packed codes of an activation; those of a GEGLU have half the channels."""
    if x.ndim == 4:
        return [x.shape[0], x.shape[2], x.shape[3], code_bytes(x.shape[1], bits)]
    return [x.shape[0], math.prod(x.shape[1:-1]), 1, code_bytes(x.shape[-1] // (2 if activation == "geglu" else 1), bits)]


def _quantize(traced: bool, x: Tensor, *arguments: Any) -> Tensor:  # in the order of the schema, whose types torch has checked
    *table, activation, rotation = arguments
    channels = check_values("quantize", x)
    check_activation("quantize", x, activation)
    check_rotation("quantize", x, channels // 2 if activation == "geglu" else channels, rotation)
    return _to_codes("quantize", traced, x, None, Table(*table), activation, rotation)


def _quantize_normed(traced: bool, x: Tensor, *arguments: Any) -> Tensor:
    norm, (groups, *table, activation) = Norm(*arguments[:4]), arguments[4:]
    norm.check("quantize_normed", x, check_values("quantize_normed", x), groups)
    check_activation("quantize_normed", x, activation, NORM_ACTIVATIONS)
    return _to_codes("quantize_normed", traced, x, norm, Table(*table), activation)


def _to_codes(op: str, traced: bool, x: Tensor, norm: Norm | None, table: Table, activation: str, rotation: int = 0) -> Tensor:
    shape = _checked_codes(op, traced, x, table, activation)
    if traced:
        return x.new_empty(shape, dtype=torch.uint8)
    codes: Tensor = _implementation(x).quantize(x, norm, table, activation=activation, rotation=rotation)
    return codes.view(shape)


def _checked_codes(op: str, traced: bool, x: Tensor, table: Table, activation: str = "none") -> list[int]:
    """Shape of the codes, once the table and the sizes are checked."""
    table.check(op, x)
    shape = codes_shape(x, table.bits, activation)
    if not traced:
        check_size(op, x=x.shape, codes=shape)
        check_rows(op, table.rows, len(table.inv_scale))
    return shape


def _quantize_row_normed(traced: bool, x: Tensor, *arguments: Any) -> Tensor:
    op, norm, (*columns, rotation) = "quantize_row_normed", RowNorm(*arguments[:6]), arguments[6:]
    table = Table(*columns)
    channels = check_values(op, x)
    norm.check(op, x)
    check_rotation(op, x, channels, rotation)
    shape = _checked_codes(op, traced, x, table)
    if traced:
        return x.new_empty(shape, dtype=torch.uint8)
    codes: Tensor = _implementation(x).quantize_rows(x, norm, table, rotation=rotation)
    return codes.view(shape)


def _group_stats(traced: bool, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    check_groups("group_stats", check_values("group_stats", x), groups)
    check_eps("group_stats", eps)
    if traced:
        mean = x.new_empty((x.shape[0], groups), dtype=torch.float32)
        return mean, torch.empty_like(mean)
    check_size("group_stats", x=x.shape)
    statistics: tuple[Tensor, Tensor] = _implementation(x).group_stats(x, groups, eps)
    return statistics


def _conv2d(traced: bool, *arguments: Any) -> Tensor:
    operands, (kernel, stride, padding, dtype) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    shape = operands.shape("conv2d", kernel, stride, padding)
    operands.check("conv2d", shape, [shape.N, shape.K, shape.P, shape.Q], dtype)
    last = {name: x.permute(0, 2, 3, 1) for name in ("residual", "low") if (x := getattr(operands, name)) is not None}
    operands = replace(operands, **last)
    return _convolved("conv2d", traced, operands, shape, dtype).permute(0, 3, 1, 2)


def _linear(traced: bool, *arguments: Any) -> Tensor:
    operands, (leading, dtype) = Operands(*arguments[:_COUNT]), arguments[_COUNT:]
    shape = operands.shape("linear", (1, 1), stride=1, padding=0)
    check_leading("linear", operands.codes, leading)
    operands.check("linear", shape, [*leading, shape.K], dtype)
    return _convolved("linear", traced, operands, shape, dtype).view(*leading, shape.K)


def _convolved(op: str, traced: bool, operands: Operands, shape: ConvShape, dtype: torch.dtype) -> Tensor:
    """[N, P, Q, K], contiguous."""
    result = (shape.N, shape.P, shape.Q, shape.K)
    if traced:
        return operands.codes.new_empty(result, dtype=dtype)
    check_size(op, codes=operands.codes.shape, weight=operands.weight.shape, output=result)
    check_rows(op, operands.rows, len(operands.act_scale))
    y: Tensor = _implementation(operands.codes).convolve(operands, shape, dtype)
    return y


def _attention_s8(traced: bool, *arguments: Any) -> Tensor:
    operands = AttentionOperands(*arguments)
    operands.check()
    if traced:
        batch, heads, length, width = operands.query.shape
        return operands.query.new_empty((batch, length, heads, width)).transpose(1, 2)
    operands.check_sizes()
    run = cuda_attention.attention if operands.query.is_cuda else cpu_attention.attention
    return run(operands)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "quantize": _quantize,
    "group_stats": _group_stats,
    "quantize_normed": _quantize_normed,
    "quantize_row_normed": _quantize_row_normed,
    "quantize_branch": quantize_branch.quantize_branch,
    "rotary": rotary.rotary,
    "conv2d": _conv2d,
    "linear": _linear,
    "attention_s8": _attention_s8,
}


def _define(library: Any, name: str) -> None:  # torch.library.Library, whose methods carry no types
    library.define(name + SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order))
    for device in ("CPU", "CUDA"):
        library.impl(name, partial(_FUNCTIONS[name], False), device)
    torch.library.register_fake(f"edm_deploy::{name}", partial(_FUNCTIONS[name], True), lib=library)


_LIBRARY: Any = torch.library.Library("edm_deploy", "DEF")  # type: ignore[no-untyped-call]  # the operators exist as long as this object
for _name in SCHEMAS:
    _define(_LIBRARY, _name)
