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
        "    if (loaded < last) loader.load(base + writing);\n    commit_copies();",
        "    if (loaded < last) { loader.load(base + writing); commit_copies(); }",
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
    "the correction of unsigned codes is dropped": ("epilogue.cuh", "sum += p.qmin[row] * weight_sum;", "sum += 0;"),
    "the bias is added twice": (
        "epilogue.cuh",
        "if (p.bias) y[e] = __fadd_rn(y[e], columns.bias[e]);",
        "if (p.bias) y[e] = y[e] + columns.bias[e] + columns.bias[e];",
    ),
    "the bias is fused into the product": (
        "epilogue.cuh",
        "if (p.bias) y[e] = __fadd_rn(y[e], columns.bias[e]);",
        "if (p.bias) y[e] = fmaf(__int2float_rn(sums[e]), __fmul_rn(act_scale, columns.scale[e]), columns.bias[e]);",
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
        "load_values(gate, x + p.C + c0, count, wide);",
        "load_values(gate, x + c0, count, wide);",
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
    "tokens past the end are stored": (
        "row_norm.cuh",
        "if (!ROTATED && (!exists || octet >= octets)) continue;",
        "if (!ROTATED && octet >= octets) continue;",
    ),
    "the norm's affine part comes after adaLN's": (
        "row_norm.cuh",
        "  if (p.beta && count > 0) {",
        "  if (p.beta && count > 0 && !p.scale) {",
    ),
}
ROTATED = {
    "a sum of four subtracts another of them": ("hadamard.cuh", "difference[e ^ (HIGH % OCTET)]", "difference[e]"),
    "lanes exchange over the wrong distance": (
        "hadamard.cuh",
        "of_lane(difference[e], HIGH / OCTET)",
        "of_lane(difference[e], LOW / OCTET)",
    ),
    "a block of an odd power of two is one of an even": ("hadamard.cuh", "if (log % 2) {", "if (log < 0) {"),
    "a rotation is not scaled back": ("hadamard.cuh", "(127 - (log + 1) / 2) << 23", "(127 - log / 2) << 23"),
    "the factor of the octet's last channels is left out": ("hadamard.cuh", "if (block >= 8) hadamard_4<2, 4>(v);", ""),
    "the largest blocks are not rotated whole": ("hadamard.cuh", "if (block >= 256) hadamard_4<64, 128>(v);", ""),
    "lanes past the last pixel leave": ("quantize.cuh", "item - (ROTATED ? threadIdx.x % 32 : 0) < items", "item < items"),
    "codes past the last pixel are stored": ("quantize.cuh", "        if (item >= items) continue;\n", ""),
    "a token is rounded before its rotation": (
        "row_norm.cuh",
        "          hadamard(v, p.rotation);\n",
        "          float w[CHANNELS] = {}; hadamard(w, p.rotation);\n",
    ),
}
BRANCH = {
    "the branch's numbers are added to integers": (
        "convolution.cuh",
        "if (BRANCH && stage == count) dequantize",
        "if (BRANCH && stage == count + 1) dequantize",
    ),
    "the last stage of a branch is left out": (
        "convolution.cuh",
        "count + divide_up(p.rank, STAGE_CHUNKS * OCTET)",
        "count + p.rank / (STAGE_CHUNKS * OCTET)",
    ),
    "ranks past the end are read": ("convolution.cuh", "const bool exists = element < p.rank;", "const bool exists = true;"),
    "rows of a branch lie as close as its rank": ("convolution.cuh", "M - 1), p.low_stride);", "M - 1), p.rank);"),
    "every stage of a branch is its first": ("convolution.cuh", "return load_branch(stage, -1 - stages);", "return load_branch(stage, 0);"),
    "the upper pixels of a fragment are scaled as the lower": (
        "convolution.cuh",
        "min(m0 + i * 16 + g + half * 8, M - 1) / pixels",
        "min(m0 + i * 16 + g, M - 1) / pixels",
    ),
    "a channel has its neighbour's scale": ("convolution.cuh", "min(k0 + f * 8 + t * 2 + c, p.K - 1)", "min(k0 + f * 8 + t * 2, p.K - 1)"),
    "the upper half of a sum is the lower": ("convolution.cuh", "int& sum = sums[i][f][half * 2 + c];", "int& sum = sums[i][f][c];"),
    "a split sum's branch leaves out ranks": (
        "reduce.cuh",
        "for (int r = 0; r < p.rank; r += OCTET) {",
        "for (int r = 0; r + OCTET < p.rank; r += OCTET) {",
    ),
    "a split sum's channels share the first one's branch": (
        "reduce.cuh",
        "min(k0 + e, p.K - 1)) * p.rank + r",
        "min(k0, p.K - 1)) * p.rank + r",
    ),
    "a bias is forgotten behind a branch": ("epilogue.cuh", "if (p.bias) y[e]", "if (p.bias && !BRANCH) y[e]"),
}
DOWN = {
    "values are written by another swizzle than they are read": (
        "down.cuh",
        "*reinterpret_cast<uint4*>(memory + place_of(i, lane))",
        "*reinterpret_cast<uint4*>(memory + place_of(i, lane ^ 1))",
    ),
    "no barrier before the values are multiplied": ("down.cuh", "        __syncthreads();  // the tile is complete\n", ""),
    "no barrier before the next channels": ("down.cuh", "        __syncthreads();  // the next channels overwrite these\n", ""),
    "both halves of a step are multiplied by the first": (
        "down.cuh",
        "reinterpret_cast<const unsigned*>(from + CHANNELS) : 0u",
        "reinterpret_cast<const unsigned*>(from) : 0u",
    ),
    "channels past the end are multiplied": ("down.cuh", "c + CHANNELS < p.C ? *rein", "true ? *rein"),
    "pixels past the end are stored": (
        "down.cuh",
        "if (pixel < p.HW) *reinterpret_cast<unsigned*>(to)",
        "*reinterpret_cast<unsigned*>(to)",
    ),
    "the upper pixels of a fragment are the lower": ("down.cuh", "rows16 + g + half * 8;", "rows16 + g;"),
    "a warp's columns are those of another": (
        "down.cuh",
        "const int column = (warp / 2 + f * 4) * 8 + 2 * t;",
        "const int column = (warp / 2 + f * 4) * 8 + 2 * t ^ 2;",
    ),
    "a LoRA's weights are those of sample 0": (
        "down.cuh",
        "static_cast<long long>(n) * p.low_scale_stride",
        "static_cast<long long>(0) * p.low_scale_stride",
    ),
    "the branch reads rotated values": ("down.cuh", "p.low_rotated ? rotated[e] : v[e]", "rotated[e]"),
    "the mean of a token is of its first warp": (
        "down.cuh",
        "total = warp == 0 ? own : __fadd_rn(total, own);",
        "total = warp == 0 ? own : total;",
    ),
    "no warp barrier behind the statistics": (
        "down.cuh",
        "  __syncwarp();\n}\n\n// As load",
        "}\n\n// As load",
    ),
}
# The file with the entry points -> the mutants that its kernels alone show.
SOWN = {"kernels.cu": MUTANTS, "rotated.cu": ROTATED, "branch.cu": BRANCH, "down.cu": DOWN}
# An index, a bound, a rounding and a sum in every run; each takes about two seconds to compile and run.
IN_EVERY_RUN = (
    "B's second 16 bytes are its first again",
    "the last split is left out",
    "codes are rounded half up",
    "a sum of four subtracts another of them",
    "rows of a branch lie as close as its rank",
)
# What a mutant does not need, replaced by nothing: bfloat16, two of the tiles, and the kernels of the other half. It saves most of the time to compile.
TILES_LEFT_OUT = (r"  X\(128, 128,.*\n", r"  X\(64, 64,.*\n")
CONVOLUTIONS_OF_BF16 = r" \\\n  CONVOLUTION\(\w+, \w*, S4, s4, bf16.*\n.*bf16.*\n.*bf16.*"
LEFT_OUT = {
    "kernels.cu": (r"OF_TYPE\(bf16\)\n", CONVOLUTIONS_OF_BF16),
    "rotated.cu": (r"ROTATED\(bf16, 4\)\nROTATED\(bf16, 8\)\n",),
    "branch.cu": (r"REDUCTIONS_BRANCH\(bf16\)\n", CONVOLUTIONS_OF_BF16),
    "down.cu": (r"QUANTIZE_BRANCH\(bf16, 4\)\nQUANTIZE_BRANCH\(bf16, 8\)\n",),
}
NO_QUANTIZE = (r"  OF_TYPE_AND_BITS\(TYPE, 4\).*\n", r"  OF_TYPE_AND_BITS\(TYPE, 8\).*\n")
NO_CONVOLVE = (r"TILES\(CONVOLUTIONS\)\n",)
QUANTIZERS = ("quantize.cuh", "norm.cuh", "row_norm.cuh", "rotary.cuh", "down.cuh")
# Entry points that the checks of a file's kernels need too.
NEEDED = {"kernels.cu": (), "rotated.cu": (), "branch.cu": ("kernels.cu",), "down.cu": ("kernels.cu", "rotated.cu")}


def outcome(folder: pathlib.Path, main: str, file: str, old: str, new: str) -> str | None:
    """Builds the kernels of `main` with one replacement and checks them; returns None where the checks pass, else their message."""
    cuda = folder / "cuda"
    shutil.copytree(CUDA, cuda)
    for source in cuda.glob("*.cu"):
        if source.name not in (main, *NEEDED[main]):
            source.write_text('#include "device.cuh"\n')
            continue
        patterns = LEFT_OUT[source.name]
        if source.name == "kernels.cu":
            patterns += NO_CONVOLVE if file in QUANTIZERS else NO_QUANTIZE
        without(source, patterns)
    without(cuda / "tiles.cuh", TILES_LEFT_OUT)
    return checked(folder, file, old, new, "cases", "8")


def without(source: pathlib.Path, patterns: tuple[str, ...]) -> None:
    """Removes from a file what each pattern finds once."""
    text = source.read_text()
    for pattern in patterns:
        text, found = re.subn(pattern, "", text)
        assert found == 1, f"{source.name} holds {pattern} {found} times"
    source.write_text(text)


def checked(folder: pathlib.Path, file: str, old: str, new: str, cases: str, count: str) -> str | None:
    """Builds the source in `folder / "cuda"` with one replacement and checks it by a module of cases; returns as `outcome`."""
    cuda = folder / "cuda"
    sow(cuda / file, old, new)
    library = build(folder / "mutant.so", "-O1", "-w", cuda=cuda)
    program = [sys.executable, "-m", f"tests.engines.kernels.emulator.{cases}", str(library), "2", count]
    done = subprocess.run(program, capture_output=True, text=True, timeout=60, cwd=HERE.parents[3])
    return done.stderr or f"ended with {done.returncode}" if done.returncode else None


@pytest.mark.parametrize(
    ("main", "file"),
    [
        ("kernels.cu", "convolution.cuh"),
        ("kernels.cu", "quantize.cuh"),
        *(
            pytest.param(f"{name}.cu", f"{file}.cuh", marks=pytest.mark.extended)
            for name, file in (("rotated", "hadamard"), ("branch", "epilogue"), ("down", "down"))
        ),
    ],
)
def test_the_source_as_it_is_passes(main, file, tmp_path):
    assert outcome(tmp_path, main, file, "#pragma once", "#pragma once") is None


ALL = [(main, name) for main, mutants in SOWN.items() for name in mutants]


@pytest.mark.parametrize(
    ("main", "mutant"), [each if each[1] in IN_EVERY_RUN else pytest.param(*each, marks=pytest.mark.extended) for each in ALL]
)
def test_an_error_sown_into_the_kernels_is_found(main, mutant, tmp_path):
    assert outcome(tmp_path, main, *SOWN[main][mutant]) is not None, f"nothing noticed that {mutant}"


def test_every_text_that_a_mutant_replaces_is_there_once():
    texts = {path.name: path.read_text() for path in CUDA.iterdir()}
    assert {
        name: texts[file].count(old)
        for _, name in ALL
        for file, old, _ in (next(m[name] for m in SOWN.values() if name in m),)
        if texts[file].count(old) != 1
    } == {}
