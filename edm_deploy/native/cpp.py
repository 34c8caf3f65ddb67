"""C++ compiled for this machine's CPU and loaded, with the headers of this folder. Libraries are cached (`edm_deploy/native/code_cache.py`)."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch  # noqa: F401  # brings libgomp into the process, which the kernels then share: two teams of threads would wait for each other

from edm_deploy.errors import UnsupportedError
from edm_deploy.native.code_cache import cached_code, digest_of, first_error
from edm_deploy.storage.leftovers import scratch_directory

SHARED = Path(__file__).parent
# No fused multiply-adds but those in the source, so that results are those of plain torch, to the last bit, where the source says so.
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi", "-Wno-maybe-uninitialized")
TARGET = "-march=native"
COMPILERS = ("g++", "c++")
INSTALL = "Install one (on Debian and Ubuntu: apt install g++), or set CXX to its path"


def source_files(folder: Path) -> dict[str, bytes]:
    """The C++ source in a folder, and the headers that all share where it has none of that name, by file name."""
    paths = [*sorted(SHARED.glob("*.h")), *sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))]
    return {path.name: path.read_bytes() for path in paths}


def load_library(
    name: str, files: Mapping[str, bytes], main: str, *, what: str, remedy: str = "", flags: Sequence[str] = FLAGS, target: str = TARGET
) -> ctypes.CDLL:
    """A shared library, from the cache or compiled now, in a few seconds.

    Args:
        name: Prefix of its file in the cache.
        files: Source by file name.
        main: The file that is compiled.
        what: What is compiled, for errors, as `the cpu backend's kernels`.
        remedy: What else to do without a compiler, for errors, as `; or build for openvino`.
        flags: The compiler's options.
        target: Its options that name the CPU, separated by blanks; others than this machine's in tests only.

    Raises:
        UnsupportedError: There is no C++ compiler, it refuses the source, or the library cannot be loaded from where it is kept.
    """
    try:
        compiler = compiler_path()
        key = digest_of((tuple(flags), _macros(compiler, target)), files)
        path, _ = cached_code(f"{name}-{key}.so", lambda: _compiled(files, main, compiler, (*flags, *target.split())))
    except _CompilerError as err:
        raise UnsupportedError(f"A C++ compiler is needed for {what}, and {err}. {INSTALL}{remedy}.") from err
    try:
        return ctypes.CDLL(str(path))
    except OSError as err:  # as on a file system without permission to execute
        raise UnsupportedError(f"{path}, {what}, cannot be loaded ({err}). Set EDM_DEPLOY_CACHE to another directory{remedy}.") from err


def compiler_path() -> str:
    """The C++ compiler: CXX where it is set, else the first that is installed."""
    for name in (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS:
        if (path := shutil.which(name)) is not None:
            return path
    raise _CompilerError(f"CXX is {os.environ['CXX']!r}, which is not there" if os.environ.get("CXX") else "none is installed")


class _CompilerError(Exception):
    """What is wrong with the compiler, as a phrase."""


def _macros(compiler: str, target: str) -> str:
    """The macros that are predefined for this CPU: they name the compiler, its version and every instruction set. A cache may be shared by machines."""
    return _output([compiler, *target.split(), "-dM", "-E", "-x", "c++", os.devnull])


def _compiled(files: Mapping[str, bytes], main: str, compiler: str, flags: Sequence[str]) -> bytes:
    with scratch_directory("cpp") as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        _output([compiler, *flags, "-o", "out.so", main], scratch)
        return (scratch / "out.so").read_bytes()


def _output(command: Sequence[str], folder: Path | None = None) -> str:
    try:
        ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as err:
        raise _CompilerError(f"{command[0]} does not run: {err.strerror}") from err
    if ran.returncode:
        raise _CompilerError(f"{command[0]} refuses the source: {first_error(ran.stderr + ran.stdout)}")
    return ran.stdout
