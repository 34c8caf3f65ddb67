"""The table of tiles agrees with the source, and the choice follows the size of the map."""

import re

import pytest

from engines.kernels.build import source_files
from engines.kernels.tiles import LEAST_STAGES, MOST_SPLITS, STAGE_BYTES, TILES, choose_tile, cycles

RTX3090, A100, H200 = 82, 108, 132  # multiprocessors


def test_the_table_is_that_of_the_source():
    table = re.search(r"#define TILES\(X\)(.*?)\n\n", source_files()["tiles.cuh"].decode(), flags=re.S)[1]
    rows = [tuple(int(number) for number in row.split(",")) for row in re.findall(r"X\(([\d, ]+)\)", table)]
    assert rows == [(tile.BM, tile.BN, tile.warp_m, tile.stages, tile.threads, tile.shared_bytes, tile.blocks) for tile in TILES]


def test_shared_memory_is_what_the_stages_take():
    assert all(tile.shared_bytes == tile.stages * (tile.BM + tile.BN) * STAGE_BYTES for tile in TILES)


def test_a_grid_covers_what_is_left_over():
    assert TILES[0].grid(129, 128, 3) == (2, 1, 3)
    assert TILES[1].name == "128x64"


def test_a_large_map_takes_the_largest_tile_in_one_piece():
    """SD 1.5 at 64x64, 320 channels of 4 bits, 3x3."""
    tile, splits = choose_tile(M=16 * 64 * 64, N=320, K_bytes=9 * 160, sms=RTX3090)
    assert (tile.name, splits) == ("128x128", 1)


@pytest.mark.parametrize("sms", [RTX3090, A100, H200])
def test_a_small_map_fills_the_gpu(sms):
    """SD 1.5 at 8x8, 1280 channels, batch 1: ten tiles of 128x128 would leave seven of eight multiprocessors idle."""
    M, N, K_bytes = 64, 1280, 9 * 640
    tile, splits = choose_tile(M, N, K_bytes, sms)
    assert splits > 1
    gm, gn, _ = tile.grid(M, N, splits)
    assert gm * gn * splits > sms * 3 // 4
    assert cycles(tile, splits, M, N, K_bytes, sms) < cycles(TILES[0], 1, M, N, K_bytes, sms) / 4


def test_a_linear_of_one_row_takes_the_smallest_tile():
    """A time embedding: K of 640 bytes is too short to be worth a second kernel."""
    tile, splits = choose_tile(M=1, N=1280, K_bytes=640, sms=RTX3090)
    assert (tile.name, splits) == ("32x64", 1)


def test_no_split_is_empty_or_short():
    for stages in range(1, 200, 7):
        _, splits = choose_tile(M=16, N=64, K_bytes=stages * STAGE_BYTES, sms=RTX3090)
        assert 1 <= splits <= MOST_SPLITS
        share = -(-stages // splits)
        assert (splits - 1) * share < stages
        assert splits == 1 or stages // splits >= LEAST_STAGES


def test_more_work_never_costs_less():
    for tile in TILES:
        costs = [cycles(tile, 1, M, 640, 2880, RTX3090) for M in (64, 256, 1024, 4096, 16384)]
        assert costs == sorted(costs)
