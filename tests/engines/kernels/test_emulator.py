"""The emulator itself: its fragments against another statement of them, and every error that it can see, from kernels of a few lines."""

import itertools

import numpy as np
import pytest

from tests.engines.kernels.emulator import CUDA, STRUCTS, EmulationError, Emulator, build

PROBES = """
#include "device.cuh"
#define PROBE(NAME) extern "C" __global__ void NAME(ConvParams p)
#define MULTIPLY(KIND, NAME)                                                                                                   \\
  PROBE(NAME) {                                                                                                                \\
    const unsigned *a = (const unsigned*)p.codes + threadIdx.x * 4, *b = (const unsigned*)p.weight + threadIdx.x * 2;          \\
    const unsigned words[4] = {a[0], a[1], a[2], a[3]};                                                                        \\
    int c[4] = {1, 1, 1, 1};                                                                                                   \\
    multiply_add<KIND>(c, words, b[0], b[1]);                                                                                  \\
    for (int i = 0; i < 4; ++i) ((int*)p.out)[threadIdx.x * 4 + i] = c[i];                                                     \\
  }
MULTIPLY(S4, multiply_s4)
MULTIPLY(U4, multiply_u4)
MULTIPLY(S8, multiply_s8)
PROBE(matrices) {
  const unsigned at = shared_address(dynamic_shared()) + threadIdx.x * 16;
  copy_async(at, p.codes + threadIdx.x * 16, true);
  commit_copies();
  wait_copies<0>();
  unsigned r[4];
  load_matrices(r, at);
  for (int i = 0; i < 4; ++i) ((unsigned*)p.out)[threadIdx.x * 4 + i] = r[i];
}
PROBE(read_too_early) {
  copy_async(threadIdx.x * 16, p.codes + threadIdx.x * 16, true);
  commit_copies();
  wait_copies<1>();
  ((byte_t*)p.out)[threadIdx.x] = dynamic_shared()[threadIdx.x * 16];
  wait_copies<0>();
}
PROBE(read_unwritten) { ((byte_t*)p.out)[threadIdx.x] = dynamic_shared()[threadIdx.x]; }
PROBE(read_before_the_barrier) {
  byte_t* shared = dynamic_shared();
  shared[threadIdx.x] = 7;
  ((byte_t*)p.out)[threadIdx.x] = shared[63 - threadIdx.x];
}
PROBE(zero_fill) {
  copy_async(threadIdx.x * 16, p.codes, false);
  commit_copies();
  wait_copies<0>();
  ((byte_t*)p.out)[threadIdx.x] = dynamic_shared()[threadIdx.x * 16];
}
PROBE(lanes_apart) { if (threadIdx.x % 32 < 16) __syncwarp(); }
PROBE(two_collectives) { if (threadIdx.x % 2) __syncwarp(); else __shfl_xor_sync(~0u, 1.0f, 1); }
PROBE(barrier_left) { if (threadIdx.x < 32) __syncthreads(); }
PROBE(barrier_and_collective) { if (threadIdx.x % 2) __syncthreads(); else __syncwarp(); }
PROBE(odd_row) { unsigned r[4]; load_matrices(r, threadIdx.x * 16 + 4); }
PROBE(row_past_the_end) { unsigned r[4]; load_matrices(r, 1024 + threadIdx.x * 16); }
PROBE(odd_copy) { copy_async(threadIdx.x * 16 + 8, p.codes, true); }
PROBE(odd_source) { copy_async(threadIdx.x * 16, p.codes + 8, true); }
PROBE(never_committed) { copy_async(threadIdx.x * 16, p.codes, true); }
PROBE(never_waited_for) { copy_async(threadIdx.x * 16, p.codes, true); commit_copies(); }
PROBE(two_sizes) { fixed_shared<16>(); fixed_shared<32>(); }
"""


@pytest.fixture(scope="module")
def probes(tmp_path_factory) -> Emulator:
    """The kernels above in the place of ours."""
    folder = tmp_path_factory.mktemp("probes")
    for header in ("params.h", "device.cuh"):
        (folder / header).write_bytes((CUDA / header).read_bytes())
    (folder / "kernels.cu").write_text(PROBES)
    return Emulator(build(folder / "probes.so", "-O1", "-Wno-unused-parameter", cuda=folder))


def run(
    probes: Emulator, entry: str, codes: np.ndarray, weight: np.ndarray | None = None, threads: int = 32, words: int = 128
) -> np.ndarray:
    out = np.zeros(words, np.int32)
    params = STRUCTS["ConvParams"](codes=codes.ctypes.data, weight=None if weight is None else weight.ctypes.data, out=out.ctypes.data)
    probes.run(entry, params, (1, 1), threads, 1024)
    return out


# CuTe's layouts of the same instructions: (shape, stride) of (lane, value) -> m + M * k, coordinates column-major.
# Source: NVIDIA CUTLASS, include/cute/atom/mma_traits_sm80.hpp, SM80_16x8x64_S32S4S4S32_TN and SM80_16x8x32_S32S8S8S32_TN.
LAYOUTS = {
    4: {"A": ((4, 8, 8, 2, 2), (128, 1, 16, 8, 512)), "B": ((4, 8, 8, 2), (64, 1, 8, 256))},
    8: {"A": ((4, 8, 4, 2, 2), (64, 1, 16, 8, 256)), "B": ((4, 8, 4, 2), (32, 1, 8, 128))},
}
LAYOUT_C = ((4, 8, 2, 2), (32, 1, 16, 8))


def places(shape: tuple[int, ...], stride: tuple[int, ...], rows: int) -> list[tuple[int, int]]:
    """(row, column) of each value, lane by lane: within a lane in the order of its registers."""
    found = []
    for lane, value in itertools.product(range(32), range(int(np.prod(shape[2:])))):
        offset, left = 0, lane + 32 * value
        for size, step in zip(shape, stride, strict=True):
            offset, left = offset + left % size * step, left // size
        found.append((offset % rows, offset // rows))
    return found


@pytest.mark.parametrize(("kind", "bits", "low"), [("s4", 4, -8), ("u4", 4, 0), ("s8", 8, -128)])
def test_fragments_are_laid_out_as_in_cute(probes, kind, bits, low):
    g = np.random.default_rng(0)
    depth = 256 // bits
    a = g.integers(low, low + (1 << bits), (16, depth))
    b = g.integers(-(1 << bits - 1), 1 << bits - 1, (8, depth))

    def fragments(matrix: np.ndarray, layout: tuple) -> np.ndarray:
        values = np.array([matrix[place] for place in places(*layout, rows=len(matrix))]) & ((1 << bits) - 1)
        by_word = values.reshape(-1, 32 // bits).astype(np.uint64)
        return (by_word << (bits * np.arange(32 // bits, dtype=np.uint64))).sum(1).astype(np.uint32)

    found = run(probes, f"multiply_{kind}", fragments(a, LAYOUTS[bits]["A"]), fragments(b, LAYOUTS[bits]["B"]))
    expected = 1 + a @ b.T
    assert found.tolist() == [expected[place] for place in places(*LAYOUT_C, rows=16)]


def test_ldmatrix_gives_lane_l_word_l_mod_4_of_row_l_div_4(probes):
    words = np.arange(128, dtype=np.int32)  # row i of the 32 rows holds words 4i .. 4i + 3
    found = run(probes, "matrices", words)
    assert found.reshape(32, 4).tolist() == [[4 * (8 * i + lane // 4) + lane % 4 for i in range(4)] for lane in range(32)]


def test_what_was_not_waited_for_or_written_reads_as_poison(probes):
    codes = np.zeros(512, np.uint8)
    assert set(run(probes, "read_too_early", codes).view(np.uint8)[:32]) == {0xEE}
    assert set(run(probes, "read_unwritten", codes).view(np.uint8)[:32]) == {0xA5}
    early = run(probes, "read_before_the_barrier", codes, threads=64).view(np.uint8)[:64]
    assert set(early[:32]) == {0xA5}  # the first warp ran before the second
    assert set(run(probes, "zero_fill", codes + 9).view(np.uint8)[:32]) == {0}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("lanes_apart", "the lanes of a warp are at different collectives"),
        ("two_collectives", "the lanes of a warp are at different collectives"),
        ("barrier_and_collective", "the lanes of a warp are at different collectives"),
        ("barrier_left", "wait at a barrier that others have left"),
        ("odd_row", "misaligned address in shared memory"),
        ("odd_copy", "misaligned address in shared memory"),
        ("odd_source", "misaligned address in global memory"),
        ("row_past_the_end", "past the end of shared memory"),
        ("never_committed", "cp.async never committed"),
        ("never_waited_for", "cp.async never waited for"),
        ("two_sizes", "fixed_shared is called with two sizes"),
    ],
)
def test_what_a_gpu_leaves_undefined_is_an_error(probes, entry, message):
    codes = np.zeros(512, np.uint8)
    with pytest.raises(EmulationError, match=message):
        run(probes, entry, codes, threads=64)
    assert run(probes, "zero_fill", codes).sum() == 0  # and the next launch is none the worse
