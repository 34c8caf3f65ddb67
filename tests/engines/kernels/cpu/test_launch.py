"""The structs against a C++ compiler's own reading of params.h; numbers and the table of kernels against the source."""

import re

from edm_deploy.native.cpp import SHARED
from engines.kernels.cpu import launch
from engines.kernels.cpu.build import SOURCE
from tests.engines.kernels.test_launch import check_memory

STRUCTS = (*dict.fromkeys(launch.PARAMS.values()), launch.Call)


def test_structs_lie_in_memory_as_the_compiler_has_them(tmp_path):
    check_memory(STRUCTS, tmp_path, SOURCE / "params.h")


def test_kernels_have_the_places_of_the_librarys_table():
    table = re.search(r"KERNELS\[\] = \{(.*?)\};", (SOURCE / "kernels.cpp").read_text(), flags=re.S)[1]
    assert tuple(name.strip().removeprefix("run_") for name in table.split(",")) == launch.KERNELS
    assert set(launch.PARAMS) == set(launch.KERNELS)


def test_numbers_are_those_of_the_source():
    assert f"constexpr int STATS_CHUNK = {launch.STATS_CHUNK};" in (SHARED / "group_stats.h").read_text()
    assert f"constexpr int LANES = {launch.LANES};" in (SHARED / "simd.h").read_text()
    names = re.search(r"enum Activation \{(.*?)\};", (SOURCE / "quantize.h").read_text())[1]
    assert {name.strip().lower(): place for place, name in enumerate(names.split(","))} == launch.ACTIVATIONS
