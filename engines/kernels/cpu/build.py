"""Compile the kernels for this machine's CPU and load them."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from edm_deploy.native.cpp import FLAGS, TARGET, load_library
from edm_deploy.native.cpp import source_files as files_in

SOURCE = Path(__file__).parent
MAIN = "kernels.cpp"


@functools.cache
def library(target: str = TARGET) -> ctypes.CDLL:
    """The compiled kernels, from the cache or compiled now, in a few seconds. They use AMX where it is there and computes what it should.

    Args:
        target: The compiler's options that name the CPU; others than this machine's in tests only.

    Raises:
        UnsupportedError: There is no C++ compiler, or it refuses the source.
    """
    remedy = "; or build for openvino or ort, which need none"
    loaded = load_library("cpu", source_files(), MAIN, what="the cpu backend's kernels", remedy=remedy, flags=FLAGS, target=target)
    loaded.edm_run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    loaded.edm_run.restype = None
    loaded.edm_instructions.restype = ctypes.c_char_p
    loaded.edm_use_tiles()
    return loaded


def instructions(target: str = TARGET) -> str:
    """What integer products are computed with: `AMX`, `AVX512-VNNI`, `AVX-VNNI`, `AVX2` or `portable`."""
    return str(library(target).edm_instructions().decode())


def source_files() -> dict[str, bytes]:
    """The kernels' source by file name."""
    return files_in(SOURCE)
