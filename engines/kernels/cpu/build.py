"""Compile the kernels for this machine's CPU and load them. The library is cached like the CUDA kernels (`engines/kernels/build.py`)."""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from pathlib import Path

import torch  # noqa: F401  # brings libgomp into the process, which the kernels then share: two teams of threads would wait for each other

from edm_deploy.errors import UnsupportedError
from edm_deploy.storage.leftovers import scratch_directory
from engines.kernels.build import cached_code, digest_of
from engines.kernels.compilers import first_error

SOURCE = Path(__file__).parent
MAIN = "kernels.cpp"
# No fused multiply-adds but those in the source, so that an epilogue is that of the operators in plain torch, to the last bit.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi", "-Wno-maybe-uninitialized")
TARGET = "-march=native"
COMPILERS = ("g++", "c++")
INSTALL = "Install one (on Debian and Ubuntu: apt install g++), or set CXX to its path; or build for openvino or ort, which need none."


@functools.cache
def library(target: str = TARGET) -> ctypes.CDLL:
    """The compiled kernels, from the cache or compiled now, in a few seconds.

    Args:
        target: The compiler's option that names the CPU; another than this machine's in tests only.

    Raises:
        UnsupportedError: There is no C++ compiler, or it refuses the source.
    """
    compiler, files = compiler_path(), source_files()
    path, _ = cached_code(f"cpu-{digest_of((FLAGS, _macros(compiler, target)), files)}.so", lambda: _compiled(files, compiler, target))
    loaded = ctypes.CDLL(str(path))
    loaded.edm_run.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
    loaded.edm_run.restype = None
    loaded.edm_instructions.restype = ctypes.c_char_p
    return loaded


def instructions(target: str = TARGET) -> str:
    """What integer products are computed with: `AVX512-VNNI`, `AVX-VNNI`, `AVX2` or `portable`."""
    return str(library(target).edm_instructions().decode())


def compiler_path() -> str:
    """The C++ compiler: CXX where it is set, else the first that is installed.

    Raises:
        UnsupportedError: There is none.
    """
    for name in (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS:
        if (path := shutil.which(name)) is not None:
            return path
    missing = f"CXX is {os.environ['CXX']!r}, which is not there" if os.environ.get("CXX") else "none is installed"
    raise UnsupportedError(
        f"The cpu backend's kernels are compiled by a C++ compiler when an engine is first opened, and {missing}. {INSTALL}"
    )


def source_files() -> dict[str, bytes]:
    """The kernels' source by file name."""
    return {path.name: path.read_bytes() for path in sorted(SOURCE.iterdir()) if path.suffix in (".cpp", ".h")}


def _macros(compiler: str, target: str) -> str:
    """The macros that are predefined for this CPU: they name the compiler, its version and every instruction set. A cache may be shared by machines."""
    ran = subprocess.run([compiler, target, "-dM", "-E", "-x", "c++", os.devnull], capture_output=True, text=True, check=False)
    if ran.returncode:
        raise _refused(compiler, ran.stderr)
    return ran.stdout


def _compiled(files: dict[str, bytes], compiler: str, target: str) -> bytes:
    with scratch_directory("cpu-kernels") as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        ran = subprocess.run([compiler, *FLAGS, target, "-o", "out.so", MAIN], cwd=scratch, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise _refused(compiler, ran.stderr + ran.stdout)
        return (scratch / "out.so").read_bytes()


def _refused(compiler: str, output: str) -> UnsupportedError:
    return UnsupportedError(f"{compiler} cannot compile the cpu backend's kernels: {first_error(output)}. {INSTALL}")
