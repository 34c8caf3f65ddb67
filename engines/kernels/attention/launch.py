"""Launch parameters of attention's kernels: the ctypes mirror of the struct in `cuda/params.h`, names of entry points, grids."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from engines.kernels.build import ATTENTION
from engines.kernels.launch import THREADS, TYPES, Launch

CODE_TOKENS = 64  # tokens of a block of attention_key_codes
LEAST_CHUNK, MOST_CHUNKS = 64, 32  # tokens per block of attention_key_sums; blocks per head, which every block of attention_key_codes adds


@dataclass(frozen=True)
class Width:
    """A kernel for heads of up to `elements`. The same table is in `cuda/attention.cu`.

    Attributes:
        elements: Width of a head, to which the product with V is padded.
        warps: Warps of a block, of 16 queries each.
        keys: Keys of a stage.
        shared_bytes: Dynamic shared memory per block.
        blocks: Blocks that share a multiprocessor of an RTX 3090.
    """

    elements: int
    warps: int
    keys: int
    shared_bytes: int
    blocks: int

    @property
    def code_bytes(self) -> int:
        """Bytes of a token's codes, to which the product of queries and keys is padded."""
        return -(-self.elements // 32) * 32

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.warps

    @property
    def queries(self) -> int:
        """Queries per block."""
        return 16 * self.warps


WIDTHS = (
    Width(48, 8, 64, 25088, 2),
    Width(64, 8, 64, 29184, 2),
    Width(80, 8, 64, 37376, 2),
    Width(128, 4, 32, 26880, 3),
    Width(160, 4, 32, 33024, 2),
)
_POINTERS = "query key value out key_sums key_codes key_scale"
_SIZES = "H Lq Lk D Cb tokens chunk chunks"
_STRIDES = "query_batch query_head query_token key_batch key_head key_token value_batch value_head value_token"


class AttentionParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS.split()),
        *((name, ctypes.c_int) for name in f"{_SIZES} {_STRIDES}".split()),
        ("factor", ctypes.c_float),
    ]


def width_for(elements: int) -> Width:
    """The narrowest kernel for heads of `elements`."""
    return next(width for width in WIDTHS if elements <= width.elements)


def chunk_of(tokens: int) -> int:
    """Tokens per block of `attention_key_sums`."""
    return max(LEAST_CHUNK, -(-tokens // MOST_CHUNKS))


def attention_launches(params: AttentionParams, *, batch: int, type_name: str) -> list[Launch]:
    """Sums of keys, codes of keys, attention.

    Args:
        params: All fields set.
        batch: Samples.
        type_name: `f16` or `bf16`.
    """
    width = width_for(params.D)
    return [
        Launch(f"attention_key_sums_{type_name}", (params.chunks, params.H, batch), THREADS, 0, params, ATTENTION),
        Launch(f"attention_key_codes_{type_name}", (params.tokens // CODE_TOKENS, params.H, batch), THREADS, 0, params, ATTENTION),
        Launch(
            f"attention_s8_{width.elements}_{type_name}",
            (-(-params.Lq // width.queries), params.H, batch),
            width.threads,
            width.shared_bytes,
            params,
            ATTENTION,
        ),
    ]


def entry_points() -> list[str]:
    """Names of all kernels, which `cuda/attention.cu` must define."""
    names = [f"attention_s8_{width.elements}_{type_name}" for type_name in TYPES for width in WIDTHS]
    return [*names, *(f"attention_key_{part}_{type_name}" for type_name in TYPES for part in ("sums", "codes"))]
