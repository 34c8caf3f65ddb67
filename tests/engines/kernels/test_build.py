"""Compiling for real where NVRTC is; the cache on a stand-in for the compiler, which counts."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import pytest

from edm_deploy.errors import UnsupportedError
from engines.kernels import build, compilers
from engines.kernels.build import Compiler, Cubin, cubin

SMALL = {
    "kernels.cu": b'#include "part.h"\nextern "C" __global__ void twice(int* x) { x[threadIdx.x] *= FACTOR; }\n',
    "part.h": b"#define FACTOR 2\n",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("EDM_DEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EDM_DEPLOY_NVCC", raising=False)
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compilations(monkeypatch) -> list[str]:
    """The GPUs that the stand-in has compiled for."""
    seen: list[str] = []

    def compiled(files: dict, main: str, arch: str, compiler: Compiler) -> bytes:
        seen.append(arch)
        return b"code for " + arch.encode()

    monkeypatch.setattr(build, "compiled", compiled)
    monkeypatch.setattr(build, "nvrtc_compiler", lambda: Compiler("nvrtc", (13, 0)))
    return seen


def test_a_second_call_compiles_nothing(compilations, own_cache):
    first, second = cubin("sm_86"), cubin("sm_86")
    assert compilations == ["sm_86"]
    assert first == second
    assert (first.code, first.path.parent) == (b"code for sm_86", own_cache)
    assert [path.name for path in own_cache.iterdir()] == [first.path.name]  # no temporary file is left


def test_every_change_that_matters_has_its_own_entry(compilations, monkeypatch):
    paths = [cubin("sm_86").path, cubin("sm_89").path]
    monkeypatch.setattr(build, "nvrtc_compiler", lambda: Compiler("nvrtc", (13, 1)))
    paths.append(cubin("sm_86").path)
    monkeypatch.setattr(build, "FLAGS", ("-std=c++20",))
    paths.append(cubin("sm_86").path)
    files = build.source_files()
    monkeypatch.setattr(build, "source_files", lambda: files | {"params.h": files["params.h"] + b" "})
    paths.append(cubin("sm_86").path)
    assert len(set(paths)) == len(paths) == len(compilations)


# Dies while it moves a cubin into the cache, inside nvcc's directory, in a process that has a directory in place of the cache.
KILLED = """
import os, signal, subprocess, sys
from pathlib import Path
from edm_deploy.native import code_cache
from engines.kernels import build, compilers
def write(*args, **kwargs):
    code_cache._write_sealed(code_cache.cache_directory() / "kernels.cubin", b"code")
subprocess.run = write
os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
code_cache._fallback("/nowhere", "no reason")
compilers.compiled({"kernels.cu": b""}, "kernels.cu", "sm_86", build.Compiler("nvcc", (12, 9)))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="without locks, nothing of other runs is removed")
def test_what_a_killed_run_left_is_removed_by_the_next(compilations, own_cache, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    ran = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | {"TMPDIR": str(scratch)}, capture_output=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    assert sum(path.is_dir() for path in scratch.iterdir()) == 2
    assert list(own_cache.iterdir()) != []
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho code > out\n")
    nvcc.chmod(0o755)
    assert compilers._by_nvcc(SMALL, "kernels.cu", "sm_86", Compiler(str(nvcc), (12, 9))) == b"code\n"
    assert list(scratch.iterdir()) == []
    kept = cubin("sm_86").path
    assert list(own_cache.iterdir()) == [kept]


def test_a_cached_cubin_has_the_permissions_of_the_umask(compilations):
    before = os.umask(0o027)
    try:
        path = cubin("sm_86").path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_an_environment_variable_names_an_nvcc(compilations, monkeypatch, tmp_path):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.41'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("EDM_DEPLOY_NVCC", str(nvcc))
    built = cubin("sm_86")
    assert built.compiler == Compiler(str(nvcc), (12, 9))
    assert str(built.compiler) == "nvcc 12.9"


def test_ptx_is_cached_beside_the_cubins(compilations):
    assert [cubin(arch).path.suffix for arch in ("sm_80", "compute_80")] == [".cubin", ".ptx"]
    assert compilations == ["sm_80", "compute_80"]


def test_the_kernels_find_all_their_headers():
    files = build.source_files()
    named = {line.split('"')[1] for content in files.values() for line in content.decode().splitlines() if line.startswith("#include")}
    assert named - {"emulator.h"} <= set(files)  # that of the emulator is with its tests


def test_the_source_travels_in_the_wheel():
    root = build.SOURCE.parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["engines"]
    shipped = {path.name for pattern in patterns for path in (root / "engines").glob(pattern)}
    assert set(build.source_files()) <= shipped
    assert sum(map(len, build.source_files().values())) < 1_000_000  # bytes: built ahead, they would be a megabyte for each GPU


# ---- no compiler


def test_a_missing_nvcc_is_refused_with_nvrtc_as_the_remedy():
    with pytest.raises(UnsupportedError, match=r"No nvcc at '/nowhere/nvcc'. Name the one of a CUDA toolkit, or leave it out"):
        cubin("sm_86", "/nowhere/nvcc")
    with pytest.raises(UnsupportedError, match="--version names no release, so it is no nvcc"):
        cubin("sm_86", "true")


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(UnsupportedError, match=r"cuda-bindings cannot be imported here \(.*\). Run pip install 'edm-deploy\[cuda\]'"):
        cubin("sm_86")


def test_without_the_library_the_extra_is_named(monkeypatch):
    class Nvrtc:
        @staticmethod
        def nvrtcVersion():  # noqa: N802  # NVRTC's name
            raise RuntimeError('Failure finding "libnvrtc.so"\nand more')

    monkeypatch.setattr(compilers, "_nvrtc", lambda: Nvrtc)
    with pytest.raises(
        UnsupportedError, match=r"cannot be loaded \(Failure finding \"libnvrtc.so\"\). Run pip install 'edm-deploy\[cuda\]'"
    ):
        cubin("sm_86")


# ---- the command


def test_the_command_prints_a_line_for_each_gpu_and_source(compilations, capsys):
    assert build.main(["--arch", "sm_86, sm_89"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = ["kernels", "rotated", "branch", "down", "attention"]
    expected = [["14 bytes", f"{arch} by nvrtc 13.0"] for arch in ("sm_86", "sm_89") for _ in files]
    assert [line.split("  ")[1:2] + line.split("  ")[3:] for line in lines] == expected
    assert [line.rpartition("/")[2].split("-sm")[0] for line in lines] == files * 2


def test_the_command_ends_in_one_line():
    command = [sys.executable, "-m", "engines.kernels.build", "--arch", "sm_86", "--nvcc", "/nowhere/nvcc"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("Error: No nvcc at '/nowhere/nvcc'.")
    assert ran.stderr.count("\n") == 1


def test_a_cubin_records_its_compiler_and_path(compilations):
    built = cubin("sm_90")
    assert isinstance(built, Cubin)
    assert built.arch == "sm_90"
    assert built.path.name.startswith("kernels-sm_90-")
