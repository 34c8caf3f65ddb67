"""The compiled kernels, and ctypes mirrors of the structs that they read."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from edm_deploy.native.cpp import FLAGS, TARGET, load_library, source_files

SOURCE = Path(__file__).parent
MAIN = "kernels.cpp"
FAKE_QUANT_CHUNK = 8192  # values of a row whose gradients are summed in float32
KERNELS = ("edm_fake_quantize", "edm_fake_quantize_gradients", "edm_group_norm", "edm_group_norm_gradients")


class FakeQuantParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name, as the other."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "x", "out", "scale", "qmin", "levels", "partial", "grad_scale", "grad_qmin")),
        *((name, ctypes.c_int64) for name in ("N", "M")),
        ("type", ctypes.c_int32),
    ]


class GroupNormParams(ctypes.Structure):
    """Mirror."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("grad", "x", "out", "gamma", "beta", "mean", "rstd", "grad_gamma", "grad_beta")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("N", "HW", "C", "groups", "silu")),
    ]


@functools.cache
def library(target: str = TARGET) -> ctypes.CDLL:
    """The kernels, from the cache or compiled now, in a few seconds.

    Args:
        target: The compiler's option that names the CPU; another than this machine's in tests only.

    Raises:
        UnsupportedError: There is no C++ compiler, or it refuses the source.
    """
    remedy = "; or train with --kernels torch, which is slower"
    what = "the kernels of a training on a CPU"
    loaded = load_library("training", source_files(SOURCE), MAIN, what=what, remedy=remedy, flags=FLAGS, target=target)
    for name in KERNELS:
        getattr(loaded, name).argtypes = (ctypes.c_void_p, ctypes.c_int)
        getattr(loaded, name).restype = None
    return loaded
