"""The kernels' own source, on a CPU, against numpy; then the same under sanitizers."""

import concurrent.futures
import os
import subprocess
import sys

import numpy as np
import pytest

from engines.kernels.build import DOWN, ROTATED
from engines.kernels.launch import entry_points
from tests.engines.kernels.emulator import SANITIZE, STRUCTS, EmulationError, Emulator, cached_library
from tests.engines.kernels.emulator import cases as drawn
from tests.engines.kernels.emulator.branches import branch_quantizations
from tests.engines.kernels.emulator.rotations import rotations
from tests.engines.kernels.emulator.row_norms import rotated_row_norms, row_norms

SHAPES_EACH = [14, pytest.param(56, marks=pytest.mark.extended)]  # of each kind and type: 84 in every run


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator.built()


def check_all(emulator: Emulator, cases: list) -> None:
    """Checks cases on two CPU threads, and names the one that fails."""

    def failure(case) -> str | None:
        try:
            case.check(emulator)
        except (AssertionError, EmulationError) as error:
            return f"{case}: {error}"
        return None

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        failures = [found for found in pool.map(failure, cases) if found]
    assert failures == []


@pytest.mark.parametrize("shapes", SHAPES_EACH)
@pytest.mark.parametrize("dtype", drawn.TYPES)
@pytest.mark.parametrize("kind", drawn.KINDS)
def test_convolutions_of_random_shape_are_numpys_bit_for_bit(emulator, kind, dtype, shapes):
    g = np.random.default_rng(list(f"{kind} {dtype}".encode()))
    cases = [drawn.Convolution.drawn(g, kind, dtype) for _ in range(shapes)]
    assert {case.tile for case in cases} == set(drawn.TILES)
    assert {case.splits for case in cases} == {1, 2, 3, 4}
    assert {case.stride for case in cases} == {1, 2}
    check_all(emulator, cases)


@pytest.mark.parametrize("shapes", [10, pytest.param(56, marks=pytest.mark.extended)])
@pytest.mark.parametrize("dtype", drawn.TYPES)
@pytest.mark.parametrize("kind", drawn.KINDS)
def test_low_rank_branches_added_in_the_epilogue_are_numpys_bit_for_bit(emulator, kind, dtype, shapes):
    g = np.random.default_rng(list(f"branch {kind} {dtype}".encode()))
    cases = [drawn.Convolution.drawn(g, kind, dtype, branch=True) for _ in range(shapes)]
    assert {case.tile for case in cases} == set(drawn.TILES)
    assert {case.splits > 1 for case in cases} == {False, True}
    assert {case.rank > 32 for case in cases} == {False, True}
    check_all(emulator, cases)


@pytest.mark.parametrize("tile", drawn.TILES)
def test_every_tile_computes_a_layer_wider_than_itself(emulator, tile):
    """Several blocks each way, more stages than the ring has buffers, tiles that span samples at different rows."""
    shape = {"N": 3, "H": 8, "W": 8, "C": 160, "K": 136, "R": 3, "S": 3, "padding": 1, "residual": True}
    check_all(
        emulator, [drawn.Convolution(kind=kind, tile=tile, dtype="f16", rank=rank, **shape) for kind in drawn.KINDS for rank in (0, 72)]
    )


def test_more_splits_than_stages_add_zeros(emulator):
    shape = {"N": 1, "H": 4, "W": 4, "C": 16, "K": 16, "splits": 4}
    check_all(emulator, [drawn.Convolution(kind="s4", tile=(32, 64), dtype="f16", **shape)])


def test_every_quantizing_kernel_stores_numpys_codes(emulator):
    cases = drawn.quantizations(seed=0)
    assert len(cases) == 108
    check_all(emulator, cases)


def test_tokens_normalized_while_quantizing_have_numpys_codes(emulator):
    cases = row_norms(seed=0)
    assert {case.lanes for case in cases} == {32, 64, 128, 256}
    assert {case.entry for case in cases} == {f"quantize_rows_{dtype}_i{bits}" for dtype in drawn.TYPES for bits in (4, 8)}
    check_all(emulator, cases)


def test_channels_rotated_while_quantizing_have_numpys_codes(emulator):
    cases = [*drawn.rotated_quantizations(seed=0), *rotated_row_norms(seed=0)]
    assert {case.entry for case in cases} == set(entry_points(ROTATED))
    assert {case.rotation for case in cases} == {2, 4, 8, 16, 32, 64, 128, 256}
    check_all(emulator, cases)


def test_quantizers_in_front_of_branches_have_the_codes_of_those_without_and_numpys_product(emulator):
    cases = branch_quantizations(seed=0)
    assert {case.entry for case in cases} == set(entry_points(DOWN))
    assert {case.rotation > 0 for case in cases} == {case.scaled for case in cases} == {False, True}
    check_all(emulator, cases)


def test_rotated_queries_are_numpys_bit_for_bit(emulator):
    check_all(emulator, rotations(seed=0))


def test_group_statistics_are_those_of_float64(emulator):
    check_all(emulator, drawn.statistics(seed=0))


# ---- the emulator notices --------------------------------------------------------------------------------------------------------------------


def test_what_a_gpu_leaves_undefined_is_an_error(emulator):
    params = STRUCTS["ConvParams"](N=1, H=1, W=1, Cb=16, K=8, R=1, S=1, P=1, Q=1, stride=1, splits=1)
    kept = [np.zeros(256, np.uint8) for _ in range(8)]
    for name, array in zip(("codes", "weight", "zero", "row", "act_scale", "weight_scale", "out"), kept, strict=False):
        setattr(params, name, array.ctypes.data)
    threads, shared = drawn.TILES[64, 64]
    emulator.run("conv_s4_64x64_f16", params, (1, 1), threads, shared)
    with pytest.raises(EmulationError, match="past the end of shared memory"):
        emulator.run("conv_s4_64x64_f16", params, (1, 1), threads, 4096)  # half a stage
    params.codes += 4
    with pytest.raises(EmulationError, match="misaligned address in global memory"):
        emulator.run("conv_s4_64x64_f16", params, (1, 1), threads, shared)


@pytest.mark.parametrize(
    ("grid", "threads", "shared"), [((0, 1), 128, 0), ((1, 70000), 128, 0), ((1, 1), 100, 0), ((1, 1), 128, 101 << 10)]
)
def test_a_launch_that_no_gpu_would_do_is_an_error(emulator, grid, threads, shared):
    with pytest.raises(EmulationError, match=r"grid|whole warps|99 KB"):
        emulator.run("conv_s4_64x64_f16", STRUCTS["ConvParams"](), grid, threads, shared)


# ---- under sanitizers ------------------------------------------------------------------------------------------------------------------------


def run_sanitized(program: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python program on the sanitized build. Its arrays come from the sanitizer's malloc, so that every one ends in a red zone."""
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    head = "import numpy as np\nfrom tests.engines.kernels.emulator import *\nfrom tests.engines.kernels.emulator import cases, rotations, row_norms\n"
    # Fibers that a failed launch leaves behind are no leak of the kernels', nor is what Python keeps.
    environment = os.environ | {
        "LD_PRELOAD": runtime,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONMALLOC": "malloc",
    }
    library = cached_library("-O1", *SANITIZE)  # built here: the compiler would carry the preloaded sanitizer, too
    command = [sys.executable, "-c", head + f"emulator = Emulator({str(library)!r})\n{program}"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.extended  # compiled with sanitizers, which takes ten seconds
@pytest.mark.parametrize(("shapes", "every"), [(4, 6), (14, 2)])
def test_no_kernel_leaves_its_memory_or_does_what_is_undefined(shapes, every):
    done = run_sanitized(
        "g = np.random.default_rng(1)\n"
        "for kind in cases.KINDS:\n"
        f"    for _ in range({shapes}): cases.Convolution.drawn(g, kind, 'f16').check(emulator)\n"
        f"for case in (*cases.quantizations(1)[::{every}], *cases.statistics(1)[::3], *row_norms.row_norms(1)[::{every}], *cases.rotated_quantizations(1)[::{every}], *row_norms.rotated_row_norms(1), *rotations.rotations(1)): case.check(emulator)\n"
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.extended
def test_the_sanitizer_detects_an_output_one_element_short():
    done = run_sanitized("cases.Convolution(kind='s4', tile=(32, 64), dtype='f16', N=1, H=8, W=8, C=8, K=13, short=1).check(emulator)\n")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
