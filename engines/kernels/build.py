"""Compile the kernels for a GPU and cache the result: `cubin("sm_86")`, or `python -m engines.kernels.build --arch sm_86,sm_89`.

NVRTC, NVIDIA's compiler as a library, comes with `pip install 'edm-deploy[cuda]'` and needs neither toolkit nor GPU; nvcc is used where one is named
(--nvcc, or EDM_DEPLOY_NVCC). Cubins are cached under a key of the source, the flags, the compiler and the GPU, in EDM_DEPLOY_CACHE, else in XDG_CACHE_HOME or
~/.cache under edm-deploy.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import functools
import hashlib
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm_deploy.errors import EdmDeployError, UnsupportedError
from edm_deploy.storage.leftovers import remove_leftovers, reserve, scratch_directory

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cuda"
MAIN = "kernels.cu"
FLAGS = ("-std=c++17",)  # the same for NVRTC and nvcc
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")
INSTALL = "pip install 'edm-deploy[cuda]'"
UNFINISHED = ".unfinished-"  # prefix of the directories in the cache in which a cubin is written
SEAL = b"edm-deploy sha256 "  # follows a cached cubin, before its checksum; tools that read the cubin ignore what follows it


@dataclass(frozen=True)
class Compiler:
    """A CUDA compiler.

    Attributes:
        name: `nvrtc`, or the path of an nvcc.
        version: (major, minor) of its CUDA release.
    """

    name: str
    version: tuple[int, int]

    def __str__(self) -> str:
        return f"{Path(self.name).name} {self.version[0]}.{self.version[1]}"


@dataclass(frozen=True)
class Cubin:
    """The kernels compiled for one GPU.

    Attributes:
        path: Location in the cache.
        code: Content that the driver loads.
        arch: `sm_86`.
        compiler: The compiler; the driver's major version must not be older.
    """

    path: Path
    code: bytes
    arch: str
    compiler: Compiler


def cubin(arch: str, nvcc: str | None = None, *, main: str = MAIN) -> Cubin:
    """The kernels for `arch`, from the cache or compiled now.

    Args:
        arch: `sm_86`.
        nvcc: Path or name of nvcc; None selects EDM_DEPLOY_NVCC where it is set, else NVRTC.
        main: File in `cuda/` that is compiled.

    Raises:
        UnsupportedError: There is no compiler, it does not support `arch`, or it refuses the source.
    """
    with_nvcc = nvcc or os.environ.get("EDM_DEPLOY_NVCC")
    compiler = nvcc_compiler(with_nvcc) if with_nvcc else nvrtc_compiler()
    files = source_files()
    name = f"{Path(main).stem}-{arch}-{_key(files, main, arch, compiler)}.cubin"
    cached = cache_directory() / name
    if (code := _read(cached)) is None:
        code = compiled(files, main, arch, compiler)
        cached = _write(cached, code)
    return Cubin(cached, code, arch, compiler)


def source_files() -> dict[str, bytes]:
    """The kernels' source by file name."""
    return {path.name: path.read_bytes() for path in sorted(SOURCE.iterdir()) if path.suffix in (".cu", ".cuh", ".h")}


def nvrtc_compiler() -> Compiler:
    """NVRTC.

    Raises:
        UnsupportedError: It is not installed.
    """
    nvrtc = _nvrtc()
    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except RuntimeError as err:  # cuda-bindings is installed, the library it binds is not
        raise UnsupportedError(f"NVRTC, which compiles the kernels, cannot be loaded ({_first_line(err)}). Run {INSTALL}.") from err
    return Compiler("nvrtc", (major, minor))


def nvcc_compiler(nvcc: str) -> Compiler:
    """An nvcc by its path or name.

    Raises:
        UnsupportedError: There is none, or it does not run.
    """
    path = shutil.which(nvcc)
    if path is None:
        raise UnsupportedError(
            f"No nvcc at {nvcc!r}. Name the one of a CUDA toolkit, or leave it out: NVRTC from {INSTALL} compiles as well."
        )
    output = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+)\.(\d+)", output)
    if version is None:
        raise UnsupportedError(f"{path} --version names no release, so it is no nvcc. Name the one of a CUDA toolkit.")
    return Compiler(path, (int(version[1]), int(version[2])))


def compiled(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> bytes:
    """Compile `files[main]` for `arch`: a cubin, or PTX where `arch` is virtual, as `compute_80`.

    Raises:
        UnsupportedError: The compiler does not support `arch`, or refuses the source; the message contains its first error.
    """
    return _by_nvrtc(files, main, arch, compiler) if compiler.name == "nvrtc" else _by_nvcc(files, main, arch, compiler)


def cache_directory() -> Path:
    """Directory of compiled kernels; it may not exist yet."""
    if configured := os.environ.get("EDM_DEPLOY_CACHE"):
        return Path(configured) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edm-deploy" / "kernels"


def _key(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> str:
    digest = hashlib.sha256(repr((main, arch, str(compiler), FLAGS)).encode())
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """The content that `_write` wrote, or None where the file is missing, incomplete or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    code, seal = content[: -len(SEAL) - 32], content[-len(SEAL) - 32 :]
    if seal == SEAL + hashlib.sha256(code).digest():
        return code
    log.warning("%s is damaged; the kernels are compiled again.", path)
    return None


def _write(path: Path, code: bytes) -> Path:
    """Write `code` to `path` atomically, or to a temporary directory where `path` is not writable. Returns the location."""
    try:
        return _write_sealed(path, code)
    except OSError as err:
        return _write_sealed(_fallback(str(path.parent), err.strerror or str(err)) / path.name, code)


def _write_sealed(path: Path, code: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, UNFINISHED)
    with reserve(path.parent, UNFINISHED) as reservation:
        unfinished = reservation.directory / path.name
        unfinished.write_bytes(code + SEAL + hashlib.sha256(code).digest())
        os.replace(unfinished, path)
    return path


@functools.cache
def _fallback(directory: str, reason: str) -> Path:
    """A directory of this process only, reported once."""
    temporary = _until_exit.enter_context(scratch_directory("kernels"))
    log.warning(
        "Compiled kernels cannot be kept in %s (%s), so each process compiles them again. Set EDM_DEPLOY_CACHE to a directory that can be written.",
        directory,
        reason,
    )
    return temporary


_until_exit = contextlib.ExitStack()
atexit.register(_until_exit.close)


def _by_nvrtc(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> bytes:
    nvrtc = _nvrtc()
    known = [f"sm_{number}" for number in nvrtc.nvrtcGetSupportedArchs()[1]]
    if arch.replace("compute_", "sm_") not in known:
        raise UnsupportedError(f"{compiler} cannot compile for {arch}; it can for {', '.join(known)}.")
    headers = {name: content for name, content in files.items() if name != main}
    program = _nvrtc_ok(
        nvrtc,
        nvrtc.nvrtcCreateProgram(files[main], main.encode(), len(headers), list(headers.values()), [name.encode() for name in headers]),
    )
    try:
        options = [flag.encode() for flag in (*FLAGS, f"-arch={arch}")]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        if int(status):
            output = b" " * _nvrtc_ok(nvrtc, nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, output)
            raise _refused(compiler, arch, output.decode(errors="replace"))
        size, read = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if _virtual(arch) else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        code: bytes = b" " * _nvrtc_ok(nvrtc, size(program))
        _nvrtc_ok(nvrtc, read(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _by_nvcc(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> bytes:
    with scratch_directory("nvcc") as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        command = [compiler.name, *FLAGS, "-ptx" if _virtual(arch) else "-cubin", f"-arch={arch}", "-o", "out", main]
        ran = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise _refused(compiler, arch, ran.stderr + ran.stdout)
        return (scratch / "out").read_bytes()


def _virtual(arch: str) -> bool:
    """Whether `arch` is a virtual architecture, compiled to PTX."""
    return arch.startswith("compute_")


def _refused(compiler: Compiler, arch: str, output: str) -> UnsupportedError:
    lines = [line.strip() for line in output.replace("\0", "").splitlines() if line.strip()]
    first = next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), lines[0] if lines else "it gave no reason")
    return UnsupportedError(f"{compiler} cannot compile the kernels for {arch}: {first}")


def _nvrtc() -> Any:  # the vendor's package carries no types
    try:
        return importlib.import_module("cuda.bindings.nvrtc")
    except (ImportError, OSError) as err:
        raise UnsupportedError(
            f"The kernels are compiled by NVRTC, and cuda-bindings cannot be imported here ({err}). Run {INSTALL}."
        ) from err


def _nvrtc_ok(nvrtc: Any, result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status):
        raise UnsupportedError(f"NVRTC failed: {nvrtc.nvrtcGetErrorString(status)[1].decode()}. Install it again: {INSTALL}.")
    return values[0] if values else None


def _first_line(err: Exception) -> str:
    return (str(err).strip() or type(err).__name__).splitlines()[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile for the requested GPUs; prints path, bytes and seconds of each. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engines.kernels.build", description="Compile the kernels ahead of their first use.")
    parser.add_argument("--arch", default=",".join(ARCHS), help="compute capabilities, separated by commas (default: %(default)s)")
    parser.add_argument("--nvcc", nargs="?", const="nvcc", help="compile with this nvcc, or the one on PATH, instead of NVRTC")
    options = parser.parse_args(arguments)
    try:
        for arch in options.arch.split(","):
            start = time.perf_counter()
            built = cubin(arch.strip(), options.nvcc)
            sys.stdout.write(
                f"{built.path}  {len(built.code)} bytes  {time.perf_counter() - start:.1f} s  {built.arch} by {built.compiler}\n"
            )
    except EdmDeployError as err:
        sys.stderr.write(f"Error: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
