"""Errors sown into the kernels, one at a time: each must be found by test_ops.py, or those tests prove nothing."""

import pathlib

import pytest

from tests.cpp_mutants import AS_IT_IS, not_once, passes

# What goes wrong -> file, a text that it holds exactly once, what that becomes.
MUTANTS = {
    "a pair is subtracted the other way round": ("hadamard.h", "other - x, x + other", "x - other, x + other"),
    "blocks of an odd power of two skip a factor": ("hadamard.h", "if (log % 2 && block >= 32)", "if (log % 2 && block > 32)"),
    "a rotation is not scaled back": ("hadamard.h", "load<Floats>(v + c) * scale", "load<Floats>(v + c)"),
    "codes are not rotated": ("quantize.h", "if (!NORM && p.rotation)", "if (false)"),
    "columns left of the map are read": ("convolution.h", "(unsigned)(pixels[i].x + s) < (unsigned)p.W", "pixels[i].x + s < p.W"),
    "rows below the map are read": ("convolution.h", "(unsigned)(pixels[i].y + r) < (unsigned)p.H", "pixels[i].y + r >= 0"),
    "codes are not made unsigned": ("convolution.h", "codes ^ 0x80808080u", "codes"),
    "the next sample is not reached": ("convolution.h", "pixel.y = -p.padding, pixel.sample++;", "pixel.y = -p.padding;"),
    "the bias comes before the scale": (
        "convolution.h",
        "y[v] = y[v] + column(p.bias, v);",
        "y[v] = y[v] + column(p.bias, v) * (scale * column(p.weight_scale, v));",
    ),
    "nothing is clipped to float16": ("convolution.h", "if (p.saturate)", "if (false)"),
    "the last output channels are those of a whole vector": ("convolution.h", "if (k + VECTORS * LANES <= p.K)", "if (true)"),
    "a transformed row has another sign": ("winograd.h", "rows[8 + j] = d[8 + j] - d[4 + j]", "rows[8 + j] = d[8 + j] + d[4 + j]"),
    "an output adds a place that it subtracts": ("winograd.h", "second - third - at(3)", "second - third + at(3)"),
    "outputs are not divided by four": ("winograd.h", "(row[0] + row[1] + row[2]) >> 2", "(row[0] + row[1] + row[2]) >> 1"),
    "a tile beyond the right edge is written": ("winograd.h", "j < 2 && tile.x + j < p.Q", "j < 2"),
    "the last vector of channels is not transformed": ("winograd.h", "c < p.Cb; c += 16", "c + 16 < p.Cb; c += 16"),
    "the weights left behind the last 64 are forgotten": ("convolution_tiles.h", "if (k < length) {", "if (false) {"),
    "what is left is of the first 16 channels": ("convolution_tiles.h", "row) * weight_stride + v * TILE_BYTES, TILE_BYTES);", "row) * weight_stride, TILE_BYTES);"),
    "the second 16 pixels are the first": ("convolution_tiles.h", "_tile_loadd(5, a + TILE_ROWS * codes_stride, codes_stride);", "_tile_loadd(5, a, codes_stride);"),
    "an odd last tile of channels is left out": ("convolution_tiles.h", "v < vectors; v += 2", "v + 1 < vectors; v += 2"),
    "a filter of more taps is read in place": ("convolution_tiles.h", "p.R == 1 && p.S == 1 && p.stride == 1", "p.stride == 1"),
    "a tile's columns beyond the map are read": ("convolution_tiles.h", "(unsigned)(pixels[i].x + s) < (unsigned)p.W", "pixels[i].x + s < p.W"),
    "sums of the second tile of pixels are lost": ("convolution_tiles.h", "_tile_stored(3, sums + TILE_ROWS * stride + LANES, bytes);", ""),
    "codes are rounded half up": (
        "quantize.h",
        "__builtin_convertvector(as<Ints>((clipped + magic)) - as<Ints>(magic), Bytes)",
        "__builtin_convertvector(__builtin_convertvector(clipped + 0.5f + magic - magic, Ints), Bytes)",
    ),
    "padding channels keep what was there": ("quantize.h", "if (Cb > C) memset(codes + C, 0, Cb - C);", ""),
    "a group's statistics reach one channel too far": ("quantize.h", "last_channel = (group + 1) * size < end", "last_channel = (group + 1) * size + 1 < end"),
    "gelu ends too early": ("quantize.h", "(x >= 5.0f) | (x <= -5.0f)", "(x >= 3.0f) | (x <= -3.0f)"),
    "a reciprocal is not refined": ("simd.h", "x * (first * fused(-divisor, first, all(2.0f)))", "x * first"),
    "a group's variance leaves out its chunks' means": ("group_stats.h", " + step * step * count * pixels / (count + pixels)", ""),
    "the last chunk is left out": ("norm.h", "const int64_t items = (int64_t)p.N * chunks;", "const int64_t items = (int64_t)p.N * chunks - 1;"),
    "adaLN's scale is used without its 1": ("norm.h", "1.0f + values((const T*)p.scale", "values((const T*)p.scale"),
    "lanes behind the last channel count": ("norm.h", "choose(lane < count(c), values(x + c, count(c)) - mean, Floats{})", "values(x + c, count(c)) - mean"),
    "earlier keys are not corrected": ("attention.h", "      if (start)\n", "      if (false)\n"),
    "a score that is no number is skipped": ("attention.h", "correction + unordered;", "correction;"),
    "a pair's score that is no number is skipped": ("attention_bf16.h", "correction + unordered;", "correction;"),
    "an earlier total is not corrected": ("attention.h", "Floats sum = total[w] * correction + unordered;", "Floats sum = total[w] + unordered;"),
    "earlier pairs of keys are not corrected": ("attention_bf16.h", "if (start && _mm512", "if (false && _mm512"),
    "an earlier total of pairs is not corrected": ("attention_bf16.h", "Floats sum = total[w] * correction + unordered;", "Floats sum = total[w] + unordered;"),
    "the key behind an odd last one counts": ("attention_bf16.h", "if (keys % 2)", "if (false)"),
}  # fmt: skip
IN_EVERY_RUN = ("an output adds a place that it subtracts", "an odd last tile of channels is left out")
OF_TILES = "convolution_tiles.h"  # judged by the emulation of AMX
NEEDS = {"a reciprocal is not refined": "avx512f"} | {
    name: "avx512_bf16" for name, (file, _, _) in MUTANTS.items() if file == "attention_bf16.h"
}  # instructions without which the line is not compiled


HOME = "engines.kernels.cpu.build"
TESTS = "tests/engines/kernels/cpu/test_ops.py"


def test_every_sown_error_names_a_line_of_the_source():
    assert not_once(HOME, MUTANTS) == {}


@pytest.mark.extended
def test_the_source_as_it_is_passes(tmp_path):
    assert passes(tmp_path, HOME, TESTS, AS_IT_IS, "native")


@pytest.mark.parametrize("mutant", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.extended) for name in MUTANTS])
def test_an_error_sown_into_the_kernels_is_found(mutant, tmp_path):
    if mutant in NEEDS and NEEDS[mutant] not in pathlib.Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {NEEDS[mutant]}: the line is not compiled here")
    select = "tiles" if MUTANTS[mutant][0] == OF_TILES else "native"
    assert not passes(tmp_path, HOME, TESTS, MUTANTS[mutant], select), f"nothing noticed that {mutant}"
