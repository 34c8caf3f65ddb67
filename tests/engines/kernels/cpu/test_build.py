"""Compiling for real, and what is said where there is no compiler."""

import subprocess
import sys

import pytest

from edm_deploy.errors import UnsupportedError
from engines.kernels.cpu import build
from tests.engines.kernels.cpu.test_ops import FLAGS

QUICK = tuple("-O0" if flag == "-O3" else flag for flag in build.FLAGS)


@pytest.fixture(autouse=True)
def no_compiler_named(monkeypatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    build.library.cache_clear()


def test_a_second_process_compiles_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "FLAGS", QUICK)
    first = build.library()
    assert first.edm_vectors() in (2, 4)
    assert build.instructions() in ("AMX", "AVX512-VNNI", "AVX-VNNI", "AVX2", "portable")
    (kept,) = (tmp_path / "kernels").iterdir()
    before = kept.stat().st_mtime_ns
    code = f"from engines.kernels.cpu import build; build.FLAGS = {QUICK}; from edm_deploy.native import cpp; cpp._compiled = None; print(build.instructions())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == build.instructions()
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("target", "instructions"), [pytest.param("-march=x86-64", "portable", marks=pytest.mark.extended), ("-march=x86-64-v3", "AVX2")]
)
def test_each_instruction_set_is_another_library(target, instructions):
    assert build.instructions(target) == instructions
    assert build.library(target)._name != build.library()._name


def test_amx_is_used_where_it_computes_what_it_should():
    assert build.instructions(f"{build.TARGET} -DEDM_EMULATED_TILES") == "AMX"


@pytest.mark.skipif("amx_int8" in FLAGS, reason="this CPU has AMX")
@pytest.mark.skipif(not {"avx512_vnni", "avx512_bf16"} <= FLAGS, reason="this CPU cannot run code for one with AMX")
def test_without_amx_code_for_it_computes_by_avx512():
    """The system does not permit tiles: on a kernel before 5.16, in some containers, on another CPU."""
    assert build.instructions("-march=sapphirerapids") == "AVX512-VNNI"


def test_without_a_compiler_the_backends_without_one_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        UnsupportedError, match=r"needed for the cpu backend's kernels, and none is installed\. Install one.*; or build for openvino"
    ):
        build.library()


def test_one_thread_pool_serves_torch_and_the_kernels():
    """Two copies of libgomp would each have threads that wait by spinning."""
    code = (
        "import torch\nfrom engines.kernels.cpu.build import library\nlibrary()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"
