"""Compile the kernels for a GPU and cache the result: `cubin("sm_86")`, or `python -m engines.kernels.build --arch sm_86,sm_89`.

NVRTC, NVIDIA's compiler as a library, comes with `pip install 'edm-deploy[cuda]'` and needs neither toolkit nor GPU; nvcc is used where one is named
(--nvcc, or EDM_DEPLOY_NVCC). Cubins are cached (`edm_deploy/native/code_cache.py`) under a key of the source, the flags, the compiler and the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edm_deploy.errors import EdmDeployError
from edm_deploy.native.code_cache import cached_code, digest_of
from engines.kernels.compilers import FLAGS, PTX_VERSION, Compiler, compiled, nvcc_compiler, nvrtc_compiler, virtual

SOURCE = Path(__file__).parent / "cuda"
MAIN = "kernels.cu"
ATTENTION = "attention.cu"
ROTATED, BRANCH, DOWN = "rotated.cu", "branch.cu", "down.cu"
SOURCES = (MAIN, ROTATED, BRANCH, DOWN, ATTENTION)  # each is compiled alone, when one of its kernels is first used
ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90")


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


def _key(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> str:
    return digest_of((main, arch, str(compiler), FLAGS, *([PTX_VERSION] if virtual(arch) else [])), files)


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
