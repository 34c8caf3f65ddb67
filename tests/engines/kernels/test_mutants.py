"""Errors sown into the kernels, one at a time: each must be found by the checks of test_emulated.py, or those checks prove nothing."""

import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.engines.kernels.emulator import CUDA, HERE, build
from tests.engines.kernels.helpers.mutation import sow

# What goes wrong -> file, a text that it holds exactly once, what that becomes.
MUTANTS = {
    "the middle words of the A fragment are swapped": (
        "convolution.cuh",
        "swizzled(warp_m + lane % 16, lane / 16)",
        "swizzled(warp_m + lane % 8 + lane / 16 * 8, lane / 8 % 2)",
    ),
    "B's second 16 bytes are its first again": ("convolution.cuh", "b[k / 2][k % 2 * 2 + 1]", "b[k / 2][k % 2 * 2]"),
    "the second step reads the first step's chunks": (
        "convolution.cuh",
        "const unsigned flip = step * 2 * CHUNK;",
        "const unsigned flip = 0;",
    ),
    "no barrier before a stage is read": (
        "convolution.cuh",
        "    __syncthreads();                  // every thread's has;",
        "                                      // every thread's has;",
    ),
    "no barrier before the epilogue reuses the stages": (
        "convolution.cuh",
        "  __syncthreads();  // the stages' memory is free",
        "  // the stages' memory is free",
    ),
    "no warp barrier between writing and reading a slice": (
        "convolution.cuh",
        "    __syncwarp();\n#pragma unroll\n    for (int half",
        "#pragma unroll\n    for (int half",
    ),
    "no warp barrier before the next slice": ("convolution.cuh", "    __syncwarp();  // the next slice", "    // the next slice"),
    "one group of copies too few is waited for": (
        "convolution.cuh",
        "wait_copies<TILE::STAGES - 2>();",
        "wait_copies<TILE::STAGES - 1>();",
    ),
    "empty groups are not committed": (
        "convolution.cuh",
        "    if (loaded < count) loader.load(base + writing);\n    commit_copies();",
        "    if (loaded < count) { loader.load(base + writing); commit_copies(); }",
    ),
    "the ring has one buffer too few": (
        "convolution.cuh",
        "if (reading == TILE::SHARED_BYTES)",
        "if (reading == TILE::SHARED_BYTES - TILE::STAGE_BYTES)",
    ),
    "rows above the map are read": (
        "convolution.cuh",
        "static_cast<unsigned>(top[i] + r) < static_cast<unsigned>(p.H)",
        "top[i] + r < p.H",
    ),
    "columns right of the map are read": (
        "convolution.cuh",
        "static_cast<unsigned>(left[i] + s) < static_cast<unsigned>(p.W)",
        "left[i] + s >= 0",
    ),
    "A is read by another swizzle than it was written": (
        "convolution.cuh",
        "swizzled(warp_m + lane % 16, lane / 16)",
        "(swizzled(warp_m + lane % 16, lane / 16) ^ CHUNK)",
    ),
    "weights are not zeroed past the sum's end": (
        "convolution.cuh",
        "p.weight + (r < p.R ? weight[i] : 0), r < p.R)",
        "p.weight + (r < p.R ? weight[i] : 0), true)",
    ),
    "zero padding is the code of sample 0's row": ("convolution.cuh", "zero[i] = p.row[n] * CHUNK;", "zero[i] = p.row[0] * CHUNK;"),
    "the stride is ignored in one direction": ("convolution.cuh", "left[i] = x * p.stride - p.padding;", "left[i] = x - p.padding;"),
    "the taps of a row are counted by the filter's height": (
        "convolution.cuh",
        "if (++s == p.S) s = 0, ++r;",
        "if (++s == p.R) s = 0, ++r;",
    ),
    "rows of C are eight apart the wrong way": (
        "convolution.cuh",
        "slice + slice_place(g + 8, f * 8 + t * 2)",
        "slice + slice_place(g ^ 1, f * 8 + t * 2)",
    ),
    "a split begins where the one before begins": (
        "convolution.cuh",
        "const int begin = blockIdx.z * share,",
        "const int begin = 0 * share,",
    ),
    "partial sums of all splits lie in one place": (
        "convolution.cuh",
        "static_cast<long long>(blockIdx.z) * M + m",
        "static_cast<long long>(0) * M + m",
    ),
    "pixels past the end are stored": ("convolution.cuh", "if (m >= M || k >= p.K) continue;", "if (k >= p.K) continue;"),
    "the last split is left out": ("reduce.cuh", "split < p.splits;", "split < p.splits - 1;"),
    "the scale is that of sample 0": ("epilogue.cuh", "row = p.row[n];", "row = p.row[0];"),
    "the correction of unsigned codes is dropped": ("epilogue.cuh", "sum += p.qmin[row] * columns.weight_sum[e];", "sum += 0;"),
    "the bias is added twice": (
        "epilogue.cuh",
        "if (p.bias) y[e] = __fadd_rn(y[e], columns.bias[e]);",
        "if (p.bias) y[e] = y[e] + columns.bias[e] + columns.bias[e];",
    ),
    "the bias is fused into the product": (
        "epilogue.cuh",
        "if (p.bias) y[e] = __fadd_rn(y[e], columns.bias[e]);",
        "if (p.bias) y[e] = fmaf(__int2float_rn(sum), __fmul_rn(act_scale, columns.scale[e]), columns.bias[e]);",
    ),
    "an operand is skipped where channels are no octets": ("device.cuh", "v[e] = e < count ? to_float(from[e]) : 0.0f;", "v[e] = 0.0f;"),
    "the bias of a sample is that of sample 0": (
        "epilogue.cuh",
        "load_of_sample<T>(operand, p.sample_bias, p.sample_bias_stride, n, k0, p.K);",
        "load_of_sample<T>(operand, p.sample_bias, p.sample_bias_stride, 0, k0, p.K);",
    ),
    "samples' gates are as far apart as their biases": ("epilogue.cuh", "p.gate, p.gate_stride, n", "p.gate, p.K, n"),
    "the residual is not added behind a gate": (
        "epilogue.cuh",
        "if (p.residual) {\n    load_values(operand",
        "if (p.residual && p.gate) {\n    load_of_sample<T>(operand, p.gate, p.gate_stride, n, k0, p.K);\n  } else if (p.residual) {\n    load_values(operand",
    ),
    "what is no number is clipped": ("epilogue.cuh", "y[e] > 65504.0f ? 65504.0f :", "!(y[e] <= 65504.0f) ? 65504.0f :"),
    "nothing is clipped from below": ("epilogue.cuh", "y[e] < -65504.0f ? -65504.0f : y[e]", "y[e]"),
    "channels past the end are stored": ("epilogue.cuh", "if (k0 + e >= p.K) continue;", ""),
    "the nibbles of a byte are swapped": ("quantize.cuh", "<< (e * BITS % 32);", "<< ((BITS == 4 ? e ^ 1 : e) * BITS % 32);"),
    "codes are rounded half up": ("quantize.cuh", "__fadd_rn(clipped, 12582912.0f)", "__fadd_rn(floorf(clipped + 0.5f), 12582912.0f)"),
    "unsigned codes keep their sign": ("quantize.cuh", "- 0x4B400000 - row.offset;", "- 0x4B400000;"),
    "a gate is the value again": (
        "quantize.cuh",
        "x + static_cast<long long>(pixel) * pitch + p.C + c0",
        "x + static_cast<long long>(pixel) * pitch + c0",
    ),
    "the values of a GEGLU lie as close as its codes": (
        "quantize.cuh",
        "const int pitch = PROLOGUE == GEGLU ? 2 * p.C : p.C;",
        "const int pitch = p.C;",
    ),
    "a coefficient of the GELU is left out": ("quantize.cuh", "for (int k = 11; k >= 0; --k)", "for (int k = 10; k >= 0; --k)"),
    "the GELU by tanh has no cubic term": ("quantize.cuh", "0.044715f * (x * x)", "0.0f * (x * x)"),
    "a group's end is missed inside an octet": ("quantize.cuh", "    if (left == 0) {", "    if (left < 0) {"),
    "no barrier between turning and storing": (
        "quantize.cuh",
        "        __syncthreads();\n#pragma unroll\n        for (int i = 0; i < TURN * TURN / CHANNELS",
        "#pragma unroll\n        for (int i = 0; i < TURN * TURN / CHANNELS",
    ),
    "the variance is about zero, not the chunk's first pixel": ("norm.cuh", "v[e] - shift[e];", "v[e];"),
    "a chunk's mean leaves out the shift": ("norm.cuh", "shift[e] + sum[e] * inverse;", "sum[e] * inverse;"),
    "two sets are merged without the distance of their means": (
        "norm.cuh",
        "a.squares + b.squares + distance * distance",
        "a.squares + b.squares + 0.0f * distance",
    ),
    "the last lane of a chunk is not merged": ("norm.cuh", "other < lanes; ++other", "other < max(lanes - 1, 1); ++other"),
    "no barrier before the lanes are merged": (
        "norm.cuh",
        "        __syncthreads();\n        for (int item = threadIdx.x; item < min(",
        "        for (int item = threadIdx.x; item < min(",
    ),
    "no barrier before the next chunk": ("norm.cuh", "        __syncthreads();  // the next chunk overwrites these\n", ""),
    "no barrier before the warps are merged": (
        "norm.cuh",
        "      __syncthreads();\n      if (threadIdx.x == 0) {",
        "      if (threadIdx.x == 0) {",
    ),
    "a chunk of a sample is counted as whole though it is cut short": (
        "norm.cuh",
        "min(p.chunk, p.HW - chunk * p.chunk)}",
        "p.chunk}",
    ),
    "only the first octets of a wide map are read": ("norm.cuh", "octet0 += gridDim.y * STATS_OCTETS", "octet0 += p.C"),
    "a norm's scale is that of the first octet": ("quantize.cuh", "load_column(column, p.gamma + c0,", "load_column(column, p.gamma,"),
    "the upper half of a norm's bias is its lower half again": (
        "quantize.cuh",
        "high = reinterpret_cast<const float4*>(column)[1];",
        "high = reinterpret_cast<const float4*>(column)[0];",
    ),
    "a rotation turns the wrong way": ("rotary.cuh", "= __fsub_rn(__fmul_rn(a, cosines[e])", "= __fadd_rn(__fmul_rn(a, cosines[e])"),
    "samples have each other's angles": ("rotary.cuh", "token = head / p.H % p.L;", "token = head / p.H % (p.L + 1);"),
    "the upper half of a rotation's octet has the lower one's angles": ("rotary.cuh", "(p.sine + angle)[half]", "(p.sine + angle)[0]"),
    "the warps of a token are not added": ("row_norm.cuh", "if (lanes == 32) return own;", "return own;"),
    "no barrier before the warps of a token are added": ("row_norm.cuh", "  __syncthreads();\n  const int first", "  const int first"),
    "both sums of a token share their place": (
        "row_norm.cuh",
        "sum, slots + (slot ^= THREADS / 32), p.lanes) / channels;\n      const float rstd",
        "sum, slots + slot, p.lanes) / channels;\n      const float rstd",
    ),
    "a token's padding is counted in its variance": (
        "row_norm.cuh",
        "e < count ? __fmul_rn(distance, distance) : 0.0f",
        "__fmul_rn(distance, distance)",
    ),
    "RMSNorm subtracts the mean": ("row_norm.cuh", "p.rms ? 0.0f : row_sum", "row_sum"),
    "the shift is that of sample 0": (
        "row_norm.cuh",
        "p.shift, static_cast<long long>(n) * p.shift_stride",
        "p.shift, static_cast<long long>(0) * p.shift_stride",
    ),
    "the scale of adaLN is not added to 1": (
        "row_norm.cuh",
        "__fmul_rn(v[e], __fadd_rn(1.0f, column[e]))",
        "__fmul_rn(v[e], column[e])",
    ),
    "tokens past the end are stored": ("row_norm.cuh", "if (!exists || octet >= octets) continue;", "if (octet >= octets) continue;"),
    "the norm's affine part comes after adaLN's": (
        "row_norm.cuh",
        "        if (p.beta && count > 0) {",
        "        if (p.beta && count > 0 && !p.scale) {",
    ),
}
# An index, a bound and a rounding in every run; each takes about two seconds to compile and run.
IN_EVERY_RUN = (
    "B's second 16 bytes are its first again",
    "the last split is left out",
    "codes are rounded half up",
)
# What a mutant does not need, replaced by nothing: bfloat16, two of the tiles, and the kernels of the other half. It saves most of the time to compile.
LEFT_OUT = (
    r"OF_TYPE\(bf16\)\n",
    r" \\\n  CONVOLUTION\(S4, s4, bf16.*\n.*bf16.*\n.*bf16.*",
    r"  X\(128, 128,.*\n",
    r"  X\(64, 64,.*\n",
)
NO_QUANTIZE = (r"  OF_TYPE_AND_BITS\(TYPE, 4\).*\n", r"  OF_TYPE_AND_BITS\(TYPE, 8\).*\n")
NO_CONVOLVE = (r"TILES\(CONVOLUTIONS\)\n",)


def outcome(folder: pathlib.Path, file: str, old: str, new: str) -> str | None:
    """Builds the kernels with one replacement and checks them; returns None where the checks pass, else their message."""
    cuda = folder / "cuda"
    shutil.copytree(CUDA, cuda)
    entry_points = (cuda / "kernels.cu").read_text()
    for pattern in LEFT_OUT + (NO_CONVOLVE if file in ("quantize.cuh", "norm.cuh", "row_norm.cuh", "rotary.cuh") else NO_QUANTIZE):
        entry_points, found = re.subn(pattern, "", entry_points)
        assert found == 1, f"kernels.cu holds {pattern} {found} times"
    (cuda / "kernels.cu").write_text(entry_points)
    (cuda / "attention.cu").unlink()
    return checked(folder, file, old, new, "cases", "8")


def checked(folder: pathlib.Path, file: str, old: str, new: str, cases: str, count: str) -> str | None:
    """Builds the source in `folder / "cuda"` with one replacement and checks it by a module of cases; returns as `outcome`."""
    cuda = folder / "cuda"
    sow(cuda / file, old, new)
    library = build(folder / "mutant.so", "-O1", "-w", cuda=cuda)
    program = [sys.executable, "-m", f"tests.engines.kernels.emulator.{cases}", str(library), "2", count]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=HERE.parents[3])
    return done.stderr or f"ended with {done.returncode}" if done.returncode else None


@pytest.mark.parametrize("file", ["convolution.cuh", "quantize.cuh"])
def test_the_source_as_it_is_passes(file, tmp_path):
    assert outcome(tmp_path, file, "#pragma once", "#pragma once") is None


@pytest.mark.parametrize("mutant", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.extended) for name in MUTANTS])
def test_an_error_sown_into_the_kernels_is_found(mutant, tmp_path):
    assert outcome(tmp_path, *MUTANTS[mutant]) is not None, f"nothing noticed that {mutant}"
