"""The compiled kernels, read: integer tensor cores multiply queries and keys, float ones the values, and nothing spills."""

import sys

import pytest

from engines.kernels.attention.launch import entry_points
from engines.kernels.build import ATTENTION
from tests.engines.kernels.helpers.sass import MULTIPROCESSORS, kernels

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheels of NVRTC, nvdisasm and cuobjdump are for Linux")
# Four seconds each to compile, once; then it lies in the cache.
ARCHS = [arch if arch == "sm_86" else pytest.param(arch, marks=pytest.mark.extended) for arch in MULTIPROCESSORS]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_entry_point_is_compiled_and_nothing_spills(arch):
    found = kernels(arch, ATTENTION)
    assert set(found) == set(entry_points())
    assert {name: (kernel.stack, kernel.spills) for name, kernel in found.items() if kernel.stack or kernel.spills} == {}


@pytest.mark.parametrize("arch", ARCHS)
def test_both_products_run_on_tensor_cores_and_scores_are_converted_by_an_addition(arch):
    """A stage is unrolled: keys / 8 fragments times 32 bytes of codes, keys / 16 steps times width / 8 fragments of values."""
    for name, kernel in kernels(arch, ATTENTION).items():
        if (width := kernel.width) is None:
            continue
        type_name = {"f16": "", "bf16": ".BF16"}[name.rsplit("_", 1)[1]]
        assert kernel.count("IMMA.16832.S8.S8") == width.keys // 8 * width.code_bytes // 32 == kernel.count("IMMA"), name
        assert kernel.count(f"HMMA.16816.F32{type_name}") == width.keys // 16 * width.elements // 8 == kernel.count("HMMA"), name
        assert kernel.count("LDSM.16.M88.4") == kernel.count("IMMA") // 2, name
        assert kernel.count("LDSM.16.MT88.4") == kernel.count("HMMA") // 2, name
        assert kernel.count("MUFU.EX2") == width.keys // 2 + 2, name  # a lane's scores, and two factors of what was summed before
        assert kernel.count("I2F") == 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_is_read_and_written_16_bytes_at_a_time(arch):
    for name, kernel in kernels(arch, ATTENTION).items():
        if (width := kernel.width) is not None:
            assert kernel.count("LDGSTS.E.BYPASS.128") == kernel.count("LDGSTS") > 0, name
            assert kernel.count("STG.E.128") == kernel.count("STG") == width.elements // 16, name
        else:
            assert kernel.count("LDG.E.128") >= 4, name


@pytest.mark.parametrize("arch", ARCHS)
def test_as_many_blocks_fit_as_the_widths_were_made_for(arch):
    for name, kernel in kernels(arch, ATTENTION).items():
        if kernel.width is not None:
            assert kernel.blocks(MULTIPROCESSORS[arch]) >= kernel.width.blocks, name
