"""Choose the tile that computes a convolution, and the number of blocks that its sum is split among.

A tile is a compiled kernel: a block computes BM output pixels x BN output channels. Large tiles load less per product; small ones, and splitting the sum,
occupy every multiprocessor where the map is small. `choose_tile` compares both by a model in clock cycles; its figures are an RTX 3090's, and only their ratios
matter. It has not been compared with measurements yet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edm_deploy.numerics.kernel_layout import CHUNK

STAGE_BYTES = 4 * CHUNK  # bytes along the sum per stage, for each row of a tile
TENSOR_BYTES = (
    1024  # bytes multiplied by bytes that a multiprocessor's tensor cores do a clock: one product of 8 bits each, or two of 4 bits
)
L2_BYTES = 17.2  # a clock and multiprocessor: 2390 GB/s over 82 at 1695 MHz, profiles/gpus.toml
L2_LATENCY = 600  # cycles from a copy's start to its bytes in shared memory, under load
BLOCK_CYCLES = 1500  # start and end of a block: filling its stages, storing its tile
REDUCE_CYCLES = 2500  # starting the second kernel that adds the splits: about 1.5 us
SPLIT_MARGIN = 1.1  # expected gain that a split must exceed, given its memory and the model's accuracy
MOST_SPLITS = 16
LEAST_STAGES = 4  # per split: with fewer, a block ends before its pipeline is full


@dataclass(frozen=True)
class Tile:
    """A compiled tile, as defined by TILES in `cuda/tiles.cuh`.

    Attributes:
        BM, BN: Output pixels and output channels per block.
        warp_m: Output pixels per warp.
        stages: Buffers of the ring between memory and tensor cores.
        threads: Threads per block.
        shared_bytes: Dynamic shared memory per block.
        blocks: Blocks that fit on one multiprocessor.
    """

    BM: int
    BN: int
    warp_m: int
    stages: int
    threads: int
    shared_bytes: int
    blocks: int

    @property
    def name(self) -> str:
        """`128x64`, as in the kernels' names."""
        return f"{self.BM}x{self.BN}"

    def grid(self, M: int, N: int, splits: int) -> tuple[int, int, int]:
        """Numbers of blocks along output pixels, output channels and splits."""
        return _ceil(M, self.BM), _ceil(N, self.BN), splits


TILES = (
    Tile(128, 128, 64, 3, 256, 49152, 2),
    Tile(128, 64, 32, 4, 256, 49152, 2),
    Tile(64, 64, 32, 4, 128, 32768, 3),
    Tile(32, 64, 16, 4, 128, 24576, 4),
)


def choose_tile(M: int, N: int, K_bytes: int, sms: int) -> tuple[Tile, int]:
    """The tile and the number of splits with the fewest expected cycles; among equals, the larger tile, then the fewer splits.

    4 and 8 bits cost the same by the byte: at 4 bits a byte holds twice the products, and the tensor cores do twice as many.

    Args:
        M: Output pixels.
        N: Output channels.
        K_bytes: Bytes of the sum, filter taps * Cb.
        sms: Multiprocessors of the GPU.

    Returns:
        (tile, splits); splits > 1 needs an int32 buffer of [splits, M, N].
    """
    return min(_candidates(K_bytes), key=lambda each: (cycles(each[0], each[1], M, N, K_bytes, sms), -each[0].BM * each[0].BN, each[1]))


def cycles(tile: Tile, splits: int, M: int, N: int, K_bytes: int, sms: int) -> float:
    """Expected clock cycles of a convolution.

    Blocks are distributed to multiprocessors in waves. Within a wave, either the multiprocessor is busy (its tensor cores, or its share of L2), or, with too
    few blocks to hide the latency, each block waits for its copies. A split sum is written and read once more, and needs a second kernel.
    """
    gm, gn, _ = tile.grid(M, N, splits)
    blocks = gm * gn * splits
    stages = _ceil(_ceil(K_bytes, STAGE_BYTES), splits)
    multiply = tile.BM * tile.BN * STAGE_BYTES / TENSOR_BYTES
    load = (tile.BM + tile.BN) * STAGE_BYTES / L2_BYTES
    busy = _ceil(blocks, sms) * stages * max(multiply, load)
    wait = L2_LATENCY / (tile.stages - 1)
    alone = _ceil(blocks, sms * tile.blocks) * (stages * max(multiply, wait) + BLOCK_CYCLES)
    if splits == 1:
        return max(busy, alone)
    partial_bytes = 2 * 4 * splits * M * N  # written, then read
    return SPLIT_MARGIN * (max(busy, alone) + partial_bytes / (sms * L2_BYTES) + REDUCE_CYCLES)


def _candidates(K_bytes: int) -> Iterator[tuple[Tile, int]]:
    stages = _ceil(K_bytes, STAGE_BYTES)
    for tile in TILES:
        for splits in range(1, MOST_SPLITS + 1):
            # Splits that leave a block without stages are the same as fewer splits.
            if splits == 1 or (stages // splits >= LEAST_STAGES and _ceil(stages, _ceil(stages, splits)) == splits):
                yield tile, splits


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
