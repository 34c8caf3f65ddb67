"""Expected time of attention on a GPU: torch's in float16, and ours with 8-bit queries and keys. Computed from GPU figures and shapes, not measured.

Both products are computed at the head dimension that a kernel has, and a part of the softmax is not hidden behind them. profiles/measured.toml has the points that this
was compared with; they are of float16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from engines.kernels.attention.launch import width_for
from engines.performance.gpus import Gpu

HEAD_DIMS = (32, 64, 96, 128, 192, 256)  # of FlashAttention-2's kernels; others are padded
QUERIES = 128  # rows of a tile of FlashAttention-2
SOFTMAX_CYCLES = 0.09  # a score and multiprocessor that the products do not hide; from measured.toml's one point of an RTX A5000
SCALE_OPERATIONS = 2  # of ours more for each score, the conversion and the key's scale; none of them is taken to be hidden
# Float32 operations a clock and multiprocessor. Source: CUDA C++ Programming Guide, throughput of arithmetic instructions.
FLOAT_LANES, FLOAT_LANES_OF = 128, {"sm_80": 64}
KEY_KERNELS = 2  # in front of ours: sums of keys, codes of keys


def attention_seconds(query: Sequence[int], key: Sequence[int], gpu: Gpu) -> float:
    """Expected seconds of softmax(Q K^T) V in float16, without the launch.

    Args:
        query: Shape [B, H, Lq, D].
        key: Shape [B, H, Lk, D].
        gpu: The GPU.
    """
    *heads, length, width = query
    padded = next((size for size in HEAD_DIMS if width <= size), width)
    tiles = math.prod(heads) * math.ceil(length / QUERIES)
    scores = math.ceil(tiles / gpu.sms) * min(QUERIES, length) * key[-2]  # of the busiest multiprocessor
    return scores * (4 * padded / gpu.ops["float16"] + SOFTMAX_CYCLES) / gpu.clock


def attention_s8_seconds(query: Sequence[int], key: Sequence[int], gpu: Gpu) -> float:
    """Expected seconds of our kernels, those that encode the keys included, without the launches; arguments as of `attention_seconds`."""
    *heads, length, elements = query
    width, keys = width_for(elements), key[-2]
    tiles = math.prod(heads) * math.ceil(length / width.queries)
    scores = math.ceil(tiles / gpu.sms) * width.queries * math.ceil(keys / width.keys) * width.keys
    cycles = 2 * width.code_bytes / gpu.ops["int8"] + 2 * width.elements / gpu.ops["float16"] + SOFTMAX_CYCLES
    cycles += SCALE_OPERATIONS / FLOAT_LANES_OF.get(gpu.sm, FLOAT_LANES)
    loaded = tiles * keys * (width.code_bytes + 2 * elements + 4)  # codes, values and scales, by every tile
    return max(scores * cycles / gpu.clock, loaded / gpu.l2) + _keys_seconds(math.prod(heads) * keys, elements, width.code_bytes, gpu)


def _keys_seconds(tokens: int, elements: int, code_bytes: int, gpu: Gpu) -> float:
    """Keys are read twice, by the kernel that sums them and by the one that writes their codes."""
    read = 2 * tokens * elements
    bandwidth = gpu.l2 if read <= gpu.l2_size / 2 else gpu.dram
    return (2 * read + tokens * (code_bytes + 4)) / bandwidth
