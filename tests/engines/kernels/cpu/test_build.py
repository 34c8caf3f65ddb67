"""Compiling for real, and what is said where there is no compiler."""

import subprocess
import sys

import pytest

from edm_deploy.errors import UnsupportedError
from engines.kernels.cpu import build

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
    assert build.instructions() in ("AVX512-VNNI", "AVX-VNNI", "AVX2", "portable")
    (kept,) = (tmp_path / "kernels").iterdir()
    before = kept.stat().st_mtime_ns
    code = f"from engines.kernels.cpu import build; build.FLAGS = {QUICK}; build._compiled = None; print(build.instructions())"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == build.instructions()
    assert kept.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("target", "instructions"), [pytest.param("-march=x86-64", "portable", marks=pytest.mark.extended), ("-march=x86-64-v3", "AVX2")]
)
def test_each_instruction_set_is_another_library(target, instructions):
    assert build.instructions(target) == instructions
    assert build.library(target)._name != build.library()._name


def test_without_a_compiler_the_remedy_is_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match=r"none is installed\. Install one.*apt install g\+\+"):
        build.library()
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with pytest.raises(UnsupportedError, match="CXX is '/nowhere/g\\+\\+', which is not there"):
        build.library()


def test_a_compiler_that_refuses_the_source_is_quoted(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-dM*) exit 0;; esac\necho "out.so: error: no such option" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnsupportedError, match=r"cannot compile the cpu backend's kernels: out\.so: error: no such option"):
        build.library()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_one_thread_pool_serves_torch_and_the_kernels():
    """Two copies of libgomp would each have threads that wait by spinning."""
    code = (
        "import torch\nfrom engines.kernels.cpu.build import library\nlibrary()\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line}))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "1"
