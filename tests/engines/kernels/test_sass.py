"""The compiled kernels, read: integer tensor cores are used, nothing spills, and as many blocks share a multiprocessor as the tiles were made for."""

import pathlib
import sys

import pytest

from engines.kernels.build import ATTENTION, BRANCH, DOWN, MAIN, ROTATED
from engines.kernels.compilers import nvrtc_compiler
from engines.kernels.launch import entry_points
from engines.kernels.tiles import TILES
from tests.engines.kernels.helpers.sass import MULTIPROCESSORS, kernels, rows

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the wheels of NVRTC, nvdisasm and cuobjdump are for Linux")
INT4 = ("sm_80", "sm_86", "sm_89")  # GPUs whose tensor cores multiply 4 bits
# Each takes about ten seconds to compile, once; then it lies in the cache.
ARCHS = [arch if arch == "sm_86" else pytest.param(arch, marks=pytest.mark.extended) for arch in MULTIPROCESSORS]
DOCS = pathlib.Path(__file__).parents[3] / "docs" / "kernels.md"
BRANCHES = pytest.param(BRANCH, marks=pytest.mark.extended)  # the convolutions once more: their loop is compiled with MAIN's
MULTIPLY = {"s4": "IMMA.16864.S4.S4", "u4": "IMMA.16864.U4.S4", "s8": "IMMA.16832.S8.S8"}


def convolutions(arch: str) -> dict:
    """The convolutions that run on `arch`: a GPU without 4 bits runs the s8 ones only."""
    kinds = ("s4", "u4", "s8") if arch in INT4 else ("s8",)
    return {name: kernel for name, kernel in kernels(arch).items() if name.startswith(tuple(f"conv_{kind}_" for kind in kinds))}


@pytest.mark.parametrize("source", [MAIN, ROTATED, DOWN, BRANCHES])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_entry_point_is_compiled(arch, source):
    assert set(kernels(arch, source)) == set(entry_points(source))


@pytest.mark.parametrize("arch", ARCHS)
def test_convolutions_run_on_integer_tensor_cores(arch):
    """A stage is two steps of warp_m / 16 x 32 / 8 multiplications, unrolled, and nothing but these multiplies."""
    for name, kernel in convolutions(arch).items():
        expected = 2 * kernel.tile.warp_m // 16 * 4
        assert kernel.count(MULTIPLY[name.split("_")[1]]) == expected == kernel.count("IMMA"), name
        assert kernel.count("LDSM.16.M88.4") == 2 * (kernel.tile.warp_m // 16 + 2), name


@pytest.mark.extended
@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_a_branch_follows_the_codes_through_the_same_loop(arch):
    """As many multiplications of float16 or bfloat16 as of codes, in the tile's own registers: nothing spills, and as many blocks fit as without a branch."""
    for name, kernel in branches(arch).items():
        expected = 2 * kernel.tile.warp_m // 16 * 4
        assert kernel.count(MULTIPLY[name.split("_")[1]]) == expected == kernel.count("HMMA.16816.F32"), name
        assert kernel.count("LDSM.16.M88.4") == 2 * 2 * (kernel.tile.warp_m // 16 + 2), name
        assert (kernel.stack, kernel.spills) == (0, 0), name
        assert kernel.blocks(MULTIPROCESSORS[arch]) >= kernel.tile.blocks, name


def branches(arch: str) -> dict:
    """The convolutions with a branch that run on `arch`."""
    return {name: kernel for name, kernel in kernels(arch, BRANCH).items() if name.startswith("conv") and (arch in INT4 or "_s8_" in name)}


@pytest.mark.parametrize("arch", ARCHS)
def test_quantizers_rotate_by_shuffles_and_multiply_by_tensor_cores(arch):
    for name, kernel in (kernels(arch, ROTATED) | kernels(arch, DOWN)).items():
        assert kernel.count("SHFL.BFLY") >= 40, name  # a block of 256 channels: 8, 16 and 16 for an octet
        assert (kernel.stack, kernel.spills) == (0, 0), name
        assert kernel.blocks(MULTIPROCESSORS[arch]) >= 2, name
    for name, kernel in kernels(arch, DOWN).items():
        assert kernel.count("HMMA.16816.F32") > 0, name
        assert kernel.count("LDSM.16.M88.4") > 0, name


@pytest.mark.parametrize("arch", ARCHS)
def test_copies_go_past_the_registers_16_bytes_at_a_time(arch):
    for name, kernel in convolutions(arch).items():
        loads = (kernel.tile.BM + kernel.tile.BN) * 4 // kernel.threads
        # The stages before the loop and the one in it; a copy may be unrolled into two branches, but never be absent or narrower.
        assert kernel.count("LDGSTS.E.BYPASS.128") >= loads * kernel.tile.stages, name
        assert kernel.count("LDGSTS.E.BYPASS.128") == kernel.count("LDGSTS"), name


@pytest.mark.parametrize("arch", ARCHS)
def test_results_leave_16_bytes_at_a_time(arch):
    for name, kernel in convolutions(arch).items():
        assert kernel.count("STG.E.128") >= kernel.tile.warp_m // 8, name


@pytest.mark.parametrize("arch", ARCHS)
def test_memory_bound_kernels_load_16_bytes_at_a_time(arch):
    """Statistics: the chunk's first pixel and four more in flight. A norm before rounding: x, two halves of gamma and of beta.

    A norm of tokens: four octets of x, and of scale and shift; GEGLU: values and gates. A rotation: x, two halves of cosines and sines.
    """
    least = {"group_stats_partial": 5, "quantize_rows": 12, "rotary": 5}
    for name, kernel in kernels(arch).items():
        if name.startswith("quantize_last"):
            assert kernel.count("LDG.E.128") >= (5 if "norm" in name else 2 if "geglu" in name else 1), name
        elif (wide := [count for prefix, count in least.items() if name.startswith(prefix)]) != []:
            assert kernel.count("LDG.E.128") >= wide[0], name


@pytest.mark.parametrize("arch", ARCHS)
def test_nothing_spills(arch):
    runs = kernels(arch) if arch in INT4 else {n: k for n, k in kernels(arch).items() if not n.startswith(("conv_s4_", "conv_u4_"))}
    assert {name: (kernel.stack, kernel.spills) for name, kernel in runs.items() if kernel.stack or kernel.spills} == {}


@pytest.mark.parametrize("arch", ARCHS)
def test_as_many_blocks_fit_as_the_tiles_were_made_for(arch):
    for name, kernel in convolutions(arch).items():
        assert kernel.blocks(MULTIPROCESSORS[arch]) >= kernel.tile.blocks, name
    assert all(kernel.registers <= 128 for kernel in convolutions(arch).values())
    assert {kernel.tile for kernel in convolutions(arch).values()} == set(TILES)


@pytest.mark.extended
def test_without_4_bit_tensor_cores_4_bit_kernels_are_emulated():
    """Why sm_90 runs 4-bit sites as 8 bits: the compiler replaces m16n8k64 by a function of 8-bit multiplications."""
    kernel = kernels("sm_90")["conv_s4_64x64_f16"]
    assert kernel.count("IMMA.16864") == 0
    assert kernel.count("CALL") > 0


@pytest.mark.parametrize("source", [MAIN, ROTATED, DOWN, ATTENTION, BRANCHES])
def test_the_page_has_the_compilers_own_table(source):
    page = DOCS.read_text()
    compiler = f"NVRTC {'.'.join(map(str, nvrtc_compiler().version))}"
    if compiler not in page:
        pytest.skip(f"the table in docs/kernels.md was made by another compiler than {compiler}")
    assert [row for row in rows("sm_86", source) if row not in page] == [], (
        "run `python -m tests.engines.kernels.helpers.sass` and put its table into docs/kernels.md"
    )
