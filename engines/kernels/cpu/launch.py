"""Calls of the kernels: ctypes mirrors of the structs in `params.h`, and the places of the kernels in the library's table."""

from __future__ import annotations

import ctypes
from typing import Any

import torch

KERNELS = ("convolve", "winograd", "quantize", "quantize_rows", "group_stats", "attention", "copy", "upsample")
TYPES = {torch.bfloat16: 0, torch.float16: 1}
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "geglu": 4}
LANES = 16  # output channels of a block of weights
STATS_CHUNK = 256  # pixels whose statistics are summed in float32


def _fields(**groups: tuple[str, type]) -> Any:
    return [(name, kind) for names, kind in groups.values() for name in names.split()]


class ConvParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name, as the others."""

    _fields_ = _fields(
        pointers=(
            "codes weight start zero row act_scale weight_scale bias sample_bias gate residual out",
            ctypes.c_void_p,
        ),
        integers=("N H W Cb K R S P Q padding stride sample_bias_stride gate_stride saturate type", ctypes.c_int32),
    )


class QuantizeParams(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(
        pointers=("x codes row inv_scale qmin qmax mean rstd gamma beta", ctypes.c_void_p),
        integers=("N HW C Cb groups activation rotation type", ctypes.c_int32),
    )


class RowNormParams(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(
        pointers=("x codes row inv_scale qmin qmax gamma beta scale shift", ctypes.c_void_p),
        floats=("eps", ctypes.c_float),
        integers=("N HW C Cb scale_stride shift_stride rms rotation type", ctypes.c_int32),
    )


class StatsParams(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(
        pointers=("x partial mean rstd", ctypes.c_void_p), floats=("eps", ctypes.c_float), integers=("N HW C groups type", ctypes.c_int32)
    )


class AttentionParams(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(
        pointers=("query key value out", ctypes.c_void_p),
        strides=("query_stride key_stride value_stride", ctypes.c_int64 * 3),
        floats=("scale", ctypes.c_float),
        integers=("N heads queries keys D type", ctypes.c_int32),
    )


class CopyParams(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(pointers=("source target", ctypes.c_void_p), integers=("rows bytes source_stride target_stride", ctypes.c_int64))


class UpsampleParams(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(pointers=("source target", ctypes.c_void_p), integers=("N H W bytes factor", ctypes.c_int64))


class Call(ctypes.Structure):
    """Mirror."""

    _fields_ = _fields(integers=("kernel", ctypes.c_int32), pointers=("params", ctypes.c_void_p))


PARAMS = {
    "convolve": ConvParams,
    "winograd": ConvParams,
    "quantize": QuantizeParams,
    "quantize_rows": RowNormParams,
    "group_stats": StatsParams,
    "attention": AttentionParams,
    "copy": CopyParams,
    "upsample": UpsampleParams,
}
