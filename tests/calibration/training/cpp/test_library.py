"""The structs against a C++ compiler's own reading of params.h; what is said without a compiler; the wheel."""

import re
import tomllib

import pytest

from calibration.training.cpp import library as home
from calibration.training.cpp.library import FAKE_QUANT_CHUNK, KERNELS, SOURCE, FakeQuantParams, GroupNormParams, library
from edm_deploy.errors import UnsupportedError
from edm_deploy.native.cpp import SHARED, source_files
from tests.engines.kernels.test_launch import check_memory


def test_structs_lie_in_memory_as_the_compiler_has_them(tmp_path):
    check_memory((FakeQuantParams, GroupNormParams), tmp_path, SOURCE / "params.h")


def test_numbers_and_entry_points_are_those_of_the_source():
    assert f"constexpr int64_t FAKE_QUANT_CHUNK = {FAKE_QUANT_CHUNK};" in (SOURCE / "params.h").read_text()
    assert tuple(re.findall(r'extern "C" void (\w+)\(', (SOURCE / home.MAIN).read_text())) == KERNELS


def test_without_a_compiler_torchs_operators_are_named(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    with pytest.raises(UnsupportedError, match=r"needed for the kernels of a training on a CPU, and none is installed.*--kernels torch"):
        library()


def test_the_source_travels_in_the_wheel():
    root = SOURCE.parents[2]
    patterns = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {
        path for package in ("calibration", "edm_deploy") for pattern in patterns[package] for path in (root / package).glob(pattern)
    }
    assert {*SOURCE.glob("*.h"), *SOURCE.glob("*.cpp"), *SHARED.glob("*.h")} <= shipped
    assert {path.name for path in shipped} >= set(source_files(SOURCE))
