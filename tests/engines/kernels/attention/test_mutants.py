"""Errors sown into attention's kernels, one at a time: each must be found by the checks of test_emulated.py."""

import pathlib
import re
import shutil

import pytest

from tests.engines.kernels.emulator import CUDA
from tests.engines.kernels.test_mutants import checked

# What goes wrong -> a text that attention.cuh holds exactly once, what that becomes.
MUTANTS = {
    "keys are not smoothed": ("v[i][e] = __fsub_rn(v[i][e], mean[d + e]);", "v[i][e] = v[i][e];"),
    "the last lane's tokens are left out of the mean": ("for (int i = 0; i < lanes; ++i) sum", "for (int i = 0; i < lanes - 1; ++i) sum"),
    "no barrier before the lanes' sums are added": (
        "  __syncthreads();\n  for (int d = threadIdx.x; d < p.D; d += THREADS) {",
        "  for (int d = threadIdx.x; d < p.D; d += THREADS) {",
    ),
    "only the first chunk is in the mean": ("chunk < p.chunks;", "chunk < 1;"),
    "a key's largest element is that of a quarter of it": (
        "  largest = quad_largest(largest);\n  const float inverse",
        "  const float inverse",
    ),
    "codes are rounded towards zero": ("__fadd_rn(clipped, SUM_OFFSET)", "__fadd_rn(truncf(clipped), SUM_OFFSET)"),
    "a code's neighbours are not cut off": ("(b & 255) << 8", "b << 8"),
    "codes of absent tokens are not written": ("if (d < p.Cb) *reinterpret_cast<uint2*>", "if (d < p.D) *reinterpret_cast<uint2*>"),
    "rows 8 to 15 have the codes of rows 0 to 7": ("warp * 16 + g + 8 * r, p.Lq - 1)", "warp * 16 + g, p.Lq - 1)"),
    "the halves of a step of queries are swapped": ("codes[half / 2][half % 2 * 2 + r]", "codes[half / 2][(1 - half % 2) * 2 + r]"),
    "the second key fragment is the first again": (
        "multiply_add<S8>(sums[f + 1], query[step], b[2], b[3]);",
        "multiply_add<S8>(sums[f + 1], query[step], b[0], b[1]);",
    ),
    "the offset of the sums is not subtracted": ("__fsub_rn(__int_as_float(sums[f][i]), SUM_OFFSET)", "__int_as_float(sums[f][i])"),
    "both columns have the first key's scale": ("i % 2 ? scale.y : scale.x", "scale.x"),
    "keys past the last one are attended to": ("if (left < TILE::KEYS) {", "if (left < 0) {"),
    "the mask begins one key late": ("if (f * 8 + t * 2 + i % 2 >= left)", "if (f * 8 + t * 2 + i % 2 > left)"),
    "the largest score is that of a quarter of the keys": ("  now = quad_largest(now);\n", ""),
    "what was summed is not rescaled": (
        "__fmul_rn(out[n][2 * r], rescale), out[n][2 * r + 1] = __fmul_rn(out[n][2 * r + 1], rescale)",
        "out[n][2 * r], out[n][2 * r + 1] = out[n][2 * r + 1]",
    ),
    "the sum of powers is not rescaled": ("total = __fmaf_rn(total, rescale, sum);", "total = __fadd_rn(total, sum);"),
    "the sum of powers is that of a quarter of the keys": ("__fdiv_rn(1.0f, quad_sum(total[r]))", "__fdiv_rn(1.0f, total[r])"),
    "values are not transposed": ("load_matrices_transposed(b, address", "load_matrices(b, address"),
    "the lower halves of the weights' fragment are swapped": (
        "to_pair<T>(p[f][2], p[f][3]), to_pair<T>(p[f + 1][0], p[f + 1][1])",
        "to_pair<T>(p[f + 1][0], p[f + 1][1]), to_pair<T>(p[f][2], p[f][3])",
    ),
    "values past the last token are read": ("const bool inside = first + row < p.Lk && d < p.D;", "const bool inside = d < p.D;"),
    "no barrier before a stage is read": ("    __syncthreads();   // every thread's has;", "    // every thread's has;"),
    "no barrier before results reuse the stages": ("  __syncthreads();  // the stages' memory is free", "  // the stages' memory is free"),
    "a stage is not waited for": ("wait_copies<0>();  // this thread's part", "wait_copies<1>();  // this thread's part"),
    "the next stage overwrites the present one": (
        "load_stage<TILE, T>(p, base + TILE::STAGE_BYTES - reading, first",
        "load_stage<TILE, T>(p, base + reading, first",
    ),
    "no warp barrier before rows are stored": ("  __syncwarp();\n", ""),
    "queries past the last one are stored": ("if (token < p.Lq && d < p.D)", "if (d < p.D)"),
    "a head's values are those of the first": ("static_cast<long long>(blockIdx.y) * p.value_head;", "0;"),
}
IN_EVERY_RUN = ("the mask begins one key late", "no barrier before a stage is read")


def outcome(folder: pathlib.Path, old: str, new: str) -> str | None:
    """Builds attention in float16 for two widths with one replacement and checks it; returns None where the checks pass, else their message."""
    cuda = folder / "cuda"
    shutil.copytree(CUDA, cuda)
    (cuda / "kernels.cu").write_text('#include "device.cuh"\n')
    for other in ("rotated.cu", "branch.cu", "down.cu"):
        (cuda / other).unlink()
    entry_points = (cuda / "attention.cu").read_text()
    for pattern in (r"WIDTHS\(OF_BF16\)\n", r"KEYS_OF\(bf16\)\n", r"  X\((48|80|160),.*\n"):
        entry_points, found = re.subn(pattern, "", entry_points)
        assert found in (1, 3), f"attention.cu holds {pattern} {found} times"
    (cuda / "attention.cu").write_text(entry_points.replace("128, 26880, 3)    \\", "128, 26880, 3)"))
    return checked(folder, "attention.cuh", old, new, "attention_cases", "6")


def test_the_source_as_it_is_passes(tmp_path):
    assert outcome(tmp_path, "#pragma once", "#pragma once") is None


@pytest.mark.parametrize("mutant", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.extended) for name in MUTANTS])
def test_an_error_sown_into_the_kernels_is_found(mutant, tmp_path):
    assert outcome(tmp_path, *MUTANTS[mutant]) is not None, f"nothing noticed that {mutant}"
