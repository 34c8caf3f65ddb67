"""NVRTC and nvcc for real where they are, on a kernel of one line; PTX for older drivers."""

import shutil
import sys

import pytest

from edm_deploy.errors import UnsupportedError
from engines.kernels import compilers
from engines.kernels.compilers import Compiler

SMALL = {
    "kernels.cu": b'#include "part.h"\nextern "C" __global__ void twice(int* x) { x[threadIdx.x] *= FACTOR; }\n',
    "part.h": b"#define FACTOR 2\n",
}
needs_nvrtc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="NVRTC's wheel is for Linux and Windows")
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


@needs_nvrtc
def test_nvrtc_compiles_without_a_gpu():
    code = compilers.compiled(SMALL, "kernels.cu", "sm_86", compilers.nvrtc_compiler())
    assert code.startswith(b"\x7fELF")
    assert b"twice" in code


@needs_nvcc
def test_nvcc_compiles_the_same_source():
    code = compilers.compiled(SMALL, "kernels.cu", "sm_86", compilers.nvcc_compiler("nvcc"))
    assert code.startswith(b"\x7fELF")
    assert b"twice" in code


@needs_nvrtc
def test_a_refused_source_is_reported_by_its_first_error():
    broken = SMALL | {"part.h": b"#define FACTOR nothing\n"}
    with pytest.raises(
        UnsupportedError, match=r'nvrtc \d+\.\d+ cannot compile the kernels for sm_86: kernels.cu\(2\): error: identifier "nothing"'
    ):
        compilers.compiled(broken, "kernels.cu", "sm_86", compilers.nvrtc_compiler())


@needs_nvcc
def test_a_source_that_nvcc_refuses_is_reported_by_its_first_error():
    compiler = compilers.nvcc_compiler("nvcc")
    with pytest.raises(UnsupportedError, match=r'cannot compile the kernels for sm_86: kernels.cu\(2\): error: identifier "nothing"'):
        compilers.compiled(SMALL | {"part.h": b"#define FACTOR nothing\n"}, "kernels.cu", "sm_86", compiler)
    with pytest.raises(UnsupportedError, match=r"cannot compile the kernels for sm_20: nvcc fatal"):
        compilers.compiled(SMALL, "kernels.cu", "sm_20", compiler)


@needs_nvrtc
def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(UnsupportedError, match=r"nvrtc \d+\.\d+ cannot compile for sm_20; it can for .*sm_86"):
        compilers.compiled(SMALL, "kernels.cu", "sm_20", compilers.nvrtc_compiler())


@needs_nvrtc
def test_ptx_bears_the_version_of_cuda_12_0():
    """A driver refuses PTX of a newer version than its own, and ptxas checks every instruction against the label."""
    code = compilers.compiled(SMALL, "kernels.cu", "compute_80", compilers.nvrtc_compiler())
    assert b"\n.version 8.0\n" in code
    assert b"\n.target sm_80\n" in code
    assert not code.endswith(b"\0")


def test_ptx_loses_what_cuda_12_0_does_not_assemble(monkeypatch):
    """ptxas 12.9 refuses this pragma under the label 8.0; without it, it assembles the kernels for sm_80, 86, 89, 90 and 120."""
    ptx = b'// NVRTC\n.version 9.3\n.target sm_80\n\t.pragma "used_bytes_mask 240";\n\tld.v2.u32 {%r1, %r2}, [%rd1];\n\0'
    monkeypatch.setattr(compilers, "_by_nvrtc", lambda *_: ptx)
    code = compilers.compiled({}, "kernels.cu", "compute_80", Compiler("nvrtc", (13, 5)))
    assert code == b"// NVRTC\n.version 8.0\n.target sm_80\n\tld.v2.u32 {%r1, %r2}, [%rd1];\n"
