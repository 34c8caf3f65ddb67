"""The structs against a C++ compiler's own reading of params.h; names against the source; grids by hand."""

import ctypes
import re
import subprocess

import pytest

from engines.kernels.build import BRANCH, DOWN, MAIN, ROTATED, SOURCE, source_files
from engines.kernels.launch import (
    BRANCH_BYTES,
    BRANCH_PIXELS,
    BRANCH_PROLOGUES,
    LARGEST_GRID,
    STATS_OCTETS,
    BranchParams,
    ConvParams,
    QuantizeParams,
    RotaryParams,
    RowNormParams,
    StatsParams,
    branch_launch,
    chunk_of,
    conv_launches,
    entry_points,
    quantize_launch,
    row_norm_launch,
    stats_launches,
)
from engines.kernels.tiles import TILES

STRUCTS = (QuantizeParams, RowNormParams, BranchParams, RotaryParams, StatsParams, ConvParams)


def test_structs_lie_in_memory_as_the_compiler_has_them(tmp_path):
    check_memory(STRUCTS, tmp_path)


def check_memory(structs, tmp_path, header=SOURCE / "params.h") -> None:
    """Raises AssertionError where a field is not where a C++ compiler has it."""
    lines = ["#include <cstddef>", "#include <cstdio>", f'#include "{header}"', "int main() {"]
    for struct in structs:
        name = struct.__name__
        lines.append(f'std::printf("{name} %zu\\n", sizeof({name}));')
        lines += [f'std::printf("{name}.{field[0]} %zu\\n", offsetof({name}, {field[0]}));' for field in struct._fields_]
    (tmp_path / "offsets.cpp").write_text("\n".join([*lines, "}"]))
    subprocess.run(["g++", "-std=c++17", "-o", tmp_path / "offsets", tmp_path / "offsets.cpp"], check=True)
    seen = subprocess.run([tmp_path / "offsets"], capture_output=True, text=True, check=True).stdout
    ours = []
    for struct in structs:
        ours.append(f"{struct.__name__} {ctypes.sizeof(struct)}")
        ours += [f"{struct.__name__}.{field[0]} {getattr(struct, field[0]).offset}" for field in struct._fields_]
    assert seen.splitlines() == ours


def test_structs_have_every_field_of_the_header():
    check_fields(STRUCTS)


def check_fields(structs) -> None:
    """Raises AssertionError where params.h has other fields."""
    header = re.sub(r"//.*", "", source_files()["params.h"].decode())
    for struct in structs:
        body = re.search(rf"struct {struct.__name__} {{(.*?)}};", header, flags=re.S)[1]
        names = [re.split(r"[ *]", name.strip())[-1] for line in body.split(";") for name in line.split(",") if name.strip()]
        assert names == [field[0] for field in struct._fields_]


def kernels_after_the_preprocessor(source, tmp_path) -> set[str]:
    """Names of the `extern "C"` kernels of a file once g++ has expanded the macros."""
    header = tmp_path / "emulator.h"
    header.write_text("")
    flags = ["-E", "-P", "-DEDM_EMULATED", f"-I{header.parent}", f"-I{SOURCE}", "-x", "c++"]
    text = subprocess.run(["g++", *flags, SOURCE / source], capture_output=True, text=True, check=True).stdout
    return set(re.findall(r'extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(', text))


@pytest.mark.parametrize("source", [MAIN, ROTATED, BRANCH, DOWN])
def test_every_kernel_that_is_launched_is_in_the_source(source, tmp_path):
    assert kernels_after_the_preprocessor(source, tmp_path) == set(entry_points(source))


def test_a_rotation_or_a_branch_is_a_kernel_of_its_own_file():
    quantize = quantize_launch(quantize_params(rotation=8), type_name="f16", bits=4, channels_last=True, norm=False, activation="gelu")
    assert (quantize.entry, quantize.source) == ("quantize_last_f16_i4_gelu_rotated", ROTATED)
    rows = row_norm_launch(RowNormParams(N=1, HW=9, C=64, lanes=32, rotation=64), type_name="bf16", bits=8)
    assert (rows.entry, rows.source) == ("quantize_rows_bf16_i8_rotated", ROTATED)
    params = ConvParams(N=2, P=8, Q=8, K=40, splits=4, rank=16)
    first, second = conv_launches(params, kind="u4", tile=TILES[2], type_name="f16")
    assert [(call.entry, call.source) for call in (first, second)] == [("conv_u4_64x64_f16", MAIN), ("reduce_u4_f16_branch", BRANCH)]
    params.splits = 1
    (one,) = conv_launches(params, kind="s8", tile=TILES[0], type_name="f16")
    assert (one.entry, one.source) == ("conv_s8_128x128_f16_branch", BRANCH)
    down = branch_launch(BranchParams(N=3, HW=33), type_name="f16", bits=4, prologue="rows")
    assert (down.entry, down.grid, down.source) == ("quantize_branch_f16_i4_rows", (2, 3, 1), DOWN)
    header = source_files()["params.h"].decode()
    enum = re.search(r"enum Prologue \{ (.*?) \};", header)[1].lower().split(", ")
    assert (*enum, "rows") == BRANCH_PROLOGUES
    assert branch_launch(BranchParams(N=1, HW=1), type_name="bf16", bits=8, prologue="geglu").params.prologue == 6
    assert int(re.search(r"BRANCH_BYTES = (\d+);", header)[1]) == BRANCH_BYTES == down.shared_bytes
    assert int(re.search(r"DOWN_PIXELS = (\d+)", source_files()["down.cuh"].decode())[1]) == BRANCH_PIXELS


def quantize_params(**fields: int) -> QuantizeParams:
    return QuantizeParams(**({"N": 2, "HW": 100, "C": 40, "Cb": 32} | fields))


def test_quantize_channels_last_gives_a_thread_eight_channels():
    """Cb = 32 bytes are 64 channels of 4 bits, 8 octets a pixel: 800 octets a sample are 4 blocks of 256."""
    call = quantize_launch(quantize_params(), type_name="f16", bits=4, channels_last=True, norm=True, activation="silu")
    assert (call.entry, call.grid, call.threads) == ("quantize_last_f16_i4_norm_silu", (4, 2, 1), 256)


def test_quantize_channels_first_gives_a_block_64_pixels_and_channels():
    call = quantize_launch(quantize_params(Cb=80), type_name="bf16", bits=8, channels_last=False, norm=False, activation="none")
    assert (call.entry, call.grid, call.threads) == ("quantize_first_bf16_i8_plain", (2, 2, 2), 256)


def test_a_grid_never_passes_what_a_gpu_takes():
    call = quantize_launch(quantize_params(N=70000), type_name="f16", bits=4, channels_last=True, norm=False, activation="none")
    assert call.grid == (4, LARGEST_GRID[1], 1)


def test_statistics_take_a_block_a_chunk_and_then_a_block_a_group():
    """SD 1.5 at 64x64: 128 chunks of 32 pixels, 40 octets; at 8x8: 4 chunks of 16 pixels, 160 octets in three bundles."""
    partial, merge = stats_launches(StatsParams(N=3, HW=4096, C=320, groups=32, chunk=chunk_of(4096)), type_name="f16")
    assert (partial.entry, partial.grid, partial.threads) == ("group_stats_partial_f16", (128, 1, 3), 256)
    assert (merge.entry, merge.grid, merge.threads) == ("group_stats_merge", (32, 3, 1), 256)
    partial, _ = stats_launches(StatsParams(N=2, HW=64, C=1280, groups=32, chunk=chunk_of(64)), type_name="bf16")
    assert (partial.entry, partial.grid) == ("group_stats_partial_bf16", (4, 3, 2))


def test_chunks_grow_with_the_map_so_that_there_are_never_more_than_128():
    assert [chunk_of(pixels) for pixels in (1, 64, 2048, 2049, 4096, 16384)] == [16, 16, 16, 17, 32, 128]
    assert int(re.search(r"STATS_OCTETS = (\d+);", source_files()["params.h"].decode())[1]) == STATS_OCTETS


def test_a_split_convolution_is_two_kernels():
    """M = 2 * 8 * 8 = 128 rows of 40 channels: 640 octets are 3 blocks."""
    params = ConvParams(N=2, P=8, Q=8, K=40, splits=4)
    tile = TILES[2]
    first, second = conv_launches(params, kind="u4", tile=tile, type_name="f16")
    assert (first.entry, first.grid) == ("conv_u4_64x64_f16", (2, 1, 4))
    assert (first.threads, first.shared_bytes) == (tile.threads, tile.shared_bytes)
    assert (second.entry, second.grid, second.threads, second.shared_bytes) == ("reduce_u4_f16", (3, 1, 1), 256, 0)
    params.splits = 1
    assert [call.entry for call in conv_launches(params, kind="s8", tile=TILES[0], type_name="bf16")] == ["conv_s8_128x128_bf16"]
