"""NVIDIA's compilers: NVRTC, a library that needs neither toolkit nor GPU, and nvcc where one is named. `compiled` calls either."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm_deploy.errors import UnsupportedError
from edm_deploy.native.code_cache import first_error
from edm_deploy.storage.leftovers import scratch_directory

FLAGS = ("-std=c++17",)  # the same for NVRTC and nvcc
INSTALL = "pip install 'edm-deploy[cuda]'"
# CUDA 12.0's. A compiler writes its own newest, which older drivers refuse to assemble. The kernels have no instruction that needs a newer one.
PTX_VERSION = (8, 0)


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
    """Compile `files[main]` for `arch`: a cubin, or PTX of version PTX_VERSION where `arch` is virtual, as `compute_80`.

    Raises:
        UnsupportedError: The compiler does not support `arch`, or refuses the source; the message contains its first error.
    """
    code = _by_nvrtc(files, main, arch, compiler) if compiler.name == "nvrtc" else _by_nvcc(files, main, arch, compiler)
    return _of_ptx_version(code) if virtual(arch) else code


def virtual(arch: str) -> bool:
    """Whether `arch` is a virtual architecture, compiled to PTX."""
    return arch.startswith("compute_")


def _of_ptx_version(ptx: bytes) -> bytes:
    """PTX labelled as PTX_VERSION, without the zero byte that NVRTC ends it with, and without the pragma that needs 8.3: a hint to debuggers."""
    label = ".version {}.{}".format(*PTX_VERSION).encode()
    ptx = re.sub(rb"^\.version \d+\.\d+", label, ptx.rstrip(b"\0"), count=1, flags=re.MULTILINE)
    return re.sub(rb'^\s*\.pragma "used_bytes_mask[^"]*";\n', b"", ptx, flags=re.MULTILINE)


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
        size, read = (nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX) if virtual(arch) else (nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        code: bytes = b" " * _nvrtc_ok(nvrtc, size(program))
        _nvrtc_ok(nvrtc, read(program, code))
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _by_nvcc(files: dict[str, bytes], main: str, arch: str, compiler: Compiler) -> bytes:
    with scratch_directory("nvcc") as scratch:
        for name, content in files.items():
            (scratch / name).write_bytes(content)
        command = [compiler.name, *FLAGS, "-ptx" if virtual(arch) else "-cubin", f"-arch={arch}", "-o", "out", main]
        ran = subprocess.run(command, cwd=scratch, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise _refused(compiler, arch, ran.stderr + ran.stdout)
        return (scratch / "out").read_bytes()


def _refused(compiler: Compiler, arch: str, output: str) -> UnsupportedError:
    return UnsupportedError(f"{compiler} cannot compile the kernels for {arch}: {first_error(output)}")


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
