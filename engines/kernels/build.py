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
import itertools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edm_deploy.errors import EdmDeployError
from edm_deploy.storage.leftovers import remove_leftovers, reserve, scratch_directory
from engines.kernels.compilers import FLAGS, PTX_VERSION, Compiler, compiled, nvcc_compiler, nvrtc_compiler, virtual

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parent / "cuda"
MAIN = "kernels.cu"
ATTENTION = "attention.cu"
SOURCES = (MAIN, ATTENTION)  # each is compiled alone, when one of its kernels is first used
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")
UNFINISHED = ".unfinished-"  # prefix of the directories in the cache in which a cubin is written
SEAL = b"edm-deploy sha256 "  # follows a cached cubin, before its checksum; tools that read the cubin ignore what follows it


@dataclass(frozen=True)
class Cubin:
    """The kernels compiled for one GPU, or as PTX, which the driver compiles for any.

    Attributes:
        path: Location in the cache.
        code: Content that the driver loads.
        arch: `sm_86`; `compute_80` for PTX.
        compiler: The compiler. A cubin needs a driver of its major version, PTX one of CUDA 12.0.
    """

    path: Path
    code: bytes
    arch: str
    compiler: Compiler


def cubin(arch: str, nvcc: str | None = None, *, main: str = MAIN) -> Cubin:
    """The kernels for `arch`, from the cache or compiled now.

    Args:
        arch: `sm_86`, or `compute_80` for PTX.
        nvcc: Path or name of nvcc; None selects EDM_DEPLOY_NVCC where it is set, else NVRTC.
        main: File in `cuda/` that is compiled.

    Raises:
        UnsupportedError: There is no compiler, it does not support `arch`, or it refuses the source.
    """
    compiler = compiler_in_use(nvcc)
    files = source_files()
    name = f"{Path(main).stem}-{arch}-{_key(files, main, arch, compiler)}.{'ptx' if virtual(arch) else 'cubin'}"
    return Cubin(*cached_code(name, lambda: compiled(files, main, arch, compiler)), arch, compiler)


def cached_code(name: str, compile_now: Callable[[], bytes]) -> tuple[Path, bytes]:
    """Compiled code by a name that stands for everything it depends on, from the cache or compiled now: its path and content.

    The file ends with a checksum, which loaders of cubins and of shared libraries ignore.
    """
    path = cache_directory() / name
    if (code := _read(path)) is None:
        code = compile_now()
        path = _write(path, code)
    return path, code


def compiler_in_use(nvcc: str | None = None) -> Compiler:
    """The compiler that `cubin` calls.

    Raises:
        UnsupportedError: There is none.
    """
    with_nvcc = nvcc or os.environ.get("EDM_DEPLOY_NVCC")
    return nvcc_compiler(with_nvcc) if with_nvcc else nvrtc_compiler()


def source_files() -> dict[str, bytes]:
    """The kernels' source by file name."""
    return {path.name: path.read_bytes() for path in sorted(SOURCE.iterdir()) if path.suffix in (".cu", ".cuh", ".h")}


def cache_directory(kind: str = "kernels") -> Path:
    """Directory of what is compiled for this machine's GPU, kernels or another kind; it may not exist yet."""
    if configured := os.environ.get("EDM_DEPLOY_CACHE"):
        return Path(configured) / kind
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edm-deploy" / kind


def _key(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> str:
    return digest_of((main, arch, str(compiler), FLAGS, *([PTX_VERSION] if virtual(arch) else [])), files)


def digest_of(settings: object, files: dict[str, bytes]) -> str:
    """32 hexadecimal digits that stand for source files, by name, and for the settings that they are compiled with."""
    digest = hashlib.sha256(repr(settings).encode())
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile for the requested GPUs; prints path, bytes and seconds of each. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m engines.kernels.build", description="Compile the kernels ahead of their first use.")
    parser.add_argument("--arch", default=",".join(ARCHS), help="compute capabilities, separated by commas (default: %(default)s)")
    parser.add_argument("--nvcc", nargs="?", const="nvcc", help="compile with this nvcc, or the one on PATH, instead of NVRTC")
    options = parser.parse_args(arguments)
    try:
        for arch, source in itertools.product(options.arch.split(","), SOURCES):
            start = time.perf_counter()
            built = cubin(arch.strip(), options.nvcc, main=source)
            sys.stdout.write(
                f"{built.path}  {len(built.code)} bytes  {time.perf_counter() - start:.1f} s  {built.arch} by {built.compiler}\n"
            )
    except EdmDeployError as err:
        sys.stderr.write(f"Error: {err}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
