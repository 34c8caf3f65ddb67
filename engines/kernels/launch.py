"""Launch parameters of each kernel: ctypes mirrors of the structs in `cuda/params.h`, names of entry points, grids.

Addresses are integers, so that torch operators, a TensorRT plugin and a benchmark share this file.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edm_deploy.numerics.kernel_layout import CODE_FORMATS
from engines.kernels.build import BRANCH, DOWN, MAIN, ROTATED
from engines.kernels.tiles import TILES, Tile

THREADS = 256  # of every kernel but the convolutions
TURN = 64  # pixels, and channels, of the tile that a block of quantize_first transposes
OCTET = 8  # channels per thread
CHANNELS_HELD = 32  # of a token, per thread of quantize_rows
STATS_OCTETS = 64  # octets of channels per block of group_stats_partial
LEAST_CHUNK, MOST_CHUNKS = 16, 128  # pixels of a chunk; chunks of a sample
LARGEST_GRID = (2**31 - 1, 65535, 65535)  # blocks along x, y, z; the kernels stride over what a smaller grid leaves
TYPES = ("f16", "bf16")  # checks.FLOATS, as entry points name them
# (norm, activation) -> prologue, as entry points name it, in the order of the enum `Prologue`
PROLOGUES = {
    (False, "none"): "plain",
    (False, "silu"): "silu",
    (True, "none"): "norm",
    (True, "silu"): "norm_silu",
    (False, "gelu"): "gelu",
    (False, "gelu_tanh"): "gelu_tanh",
    (False, "geglu"): "geglu",
}
FIRST_PROLOGUES = ("plain", "silu")  # of kernels that read channels first
BRANCH_PROLOGUES = (*PROLOGUES.values(), "rows")  # of kernels that multiply by a branch's first matrix; `rows` is a kernel of its own
BRANCH_PIXELS, BRANCH_BYTES = 32, 16640  # per block of them; its dynamic shared memory
ROTATED_PROLOGUES = tuple(name for (norm, _), name in PROLOGUES.items() if not norm)  # of kernels that rotate


def _fields(pointers: str, integers: str) -> Sequence[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in pointers.split()] + [(name, ctypes.c_int) for name in integers.split()]


class QuantizeParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = _fields("x codes row inv_scale qmin qmax mean rstd gamma beta", "N HW C Cb groups unsigned_codes rotation")


class RowNormParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = [
        *_fields(
            "x codes row inv_scale qmin qmax gamma beta scale shift",
            "N HW C Cb unsigned_codes scale_stride shift_stride lanes rms rotation",
        ),
        ("eps", ctypes.c_float),
    ]


class BranchParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = [
        *_fields(
            "x codes row inv_scale qmin qmax mean rstd gamma beta scale shift down low_scale low",
            "N HW C Cb groups unsigned_codes rotation low_rotated scale_stride shift_stride low_scale_stride lanes rms rank prologue",
        ),
        ("eps", ctypes.c_float),
    ]


class StatsParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = [*_fields("x partial mean rstd", "N HW C groups chunk"), ("eps", ctypes.c_float)]


class RotaryParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = _fields("x cosine sine out", "N L H D")


class ConvParams(ctypes.Structure):
    """Mirror of the C++ struct of the same name."""

    _fields_ = _fields(
        "codes weight zero row act_scale qmin weight_scale weight_sum bias sample_bias gate residual low up out partial",
        "N H W Cb K R S P Q padding stride splits sample_bias_stride gate_stride saturate rank low_stride",
    )


@dataclass(frozen=True)
class Launch:
    """One kernel launch, complete except for the stream.

    Attributes:
        entry: Name of the kernel.
        grid: Numbers of blocks in x, y, z.
        threads: Threads per block.
        shared_bytes: Dynamic shared memory per block.
        params: The struct that the kernel takes by value.
        source: The file in `cuda/` that defines the kernel; each is compiled and loaded at its first use.
    """

    entry: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    params: ctypes.Structure
    source: str = MAIN


def quantize_launch(params: QuantizeParams, *, type_name: str, bits: int, channels_last: bool, norm: bool, activation: str) -> Launch:
    """Quantize and pack.

    Args:
        params: All fields set.
        type_name: `f16` or `bf16`, of x.
        bits: 4 or 8.
        channels_last: Memory layout of x; a norm, and activations other than SiLU, require channels last.
        norm: Whether the fields mean and rstd are set.
        activation: Applied before rounding, from `checks.ACTIVATIONS`; to a norm's result only SiLU.
    """
    channels = params.Cb * 8 // bits
    prologue = PROLOGUES[norm, activation]
    assert channels_last or prologue in FIRST_PROLOGUES, f"no kernel computes {prologue} channels first"
    entry = f"quantize_{'last' if channels_last else 'first'}_{type_name}_i{bits}_{prologue}"
    if channels_last:
        grid = (_ceil(params.HW * channels // OCTET, THREADS), params.N, 1)
    else:
        grid = (_ceil(params.HW, TURN), _ceil(channels, TURN), params.N)
    return _rotated(Launch(entry, _clipped(*grid), THREADS, 0, params))


def _rotated(call: Launch) -> Launch:
    """The launch of a quantizer, or of the one that rotates where the params say so."""
    return replace(call, entry=f"{call.entry}_rotated", source=ROTATED) if call.params.rotation else call


def row_lanes(channels: int) -> int:
    """Threads that share a token in `quantize_rows`; with the smallest number that has room for its channels in registers, most warps need no barrier."""
    return next(lanes for lanes in (32, 64, 128, THREADS) if channels <= lanes * CHANNELS_HELD)


def row_norm_launch(params: RowNormParams, *, type_name: str, bits: int) -> Launch:
    """Normalize each token, quantize and pack.

    Args:
        params: All fields set, `lanes` from `row_lanes`.
        type_name: `f16` or `bf16`, of x.
        bits: 4 or 8.
    """
    grid = _clipped(_ceil(params.HW, THREADS // params.lanes), params.N, 1)
    return _rotated(Launch(f"quantize_rows_{type_name}_i{bits}", grid, THREADS, 0, params))


def branch_launch(params: BranchParams, *, type_name: str, bits: int, prologue: str) -> Launch:
    """Quantize, pack, and multiply by the first matrix of a low-rank branch.

    Args:
        params: All fields set but the prologue's.
        type_name: `f16` or `bf16`, of x.
        bits: 4 or 8.
        prologue: From BRANCH_PROLOGUES; `rows` normalizes tokens.
    """
    rows = prologue == "rows"
    params.prologue = 0 if rows else BRANCH_PROLOGUES.index(prologue)
    entry = f"quantize_branch_{type_name}_i{bits}{'_rows' if rows else ''}"
    return Launch(entry, _clipped(_ceil(params.HW, BRANCH_PIXELS), params.N, 1), THREADS, BRANCH_BYTES, params, DOWN)


def rotary_launch(params: RotaryParams, *, type_name: str) -> Launch:
    """Rotate queries or keys of type `f16` or `bf16`; all fields of `params` set."""
    items = params.N * params.L * params.H * params.D // OCTET
    return Launch(f"rotary_{type_name}", _clipped(_ceil(items, THREADS), 1, 1), THREADS, 0, params)


def chunk_of(pixels: int) -> int:
    """Pixels per block of `group_stats_partial`: enough blocks for every multiprocessor, few enough that merging their results costs little."""
    return max(LEAST_CHUNK, _ceil(pixels, MOST_CHUNKS))


def stats_launches(params: StatsParams, *, type_name: str) -> list[Launch]:
    """Statistics of a group norm: of chunks of pixels, then of groups.

    Args:
        params: All fields set; x is channels last, and `partial` has 2 * N * ceil(HW / chunk) * C floats.
        type_name: `f16` or `bf16`, of x.
    """
    chunks, bundles = _ceil(params.HW, params.chunk), _ceil(_ceil(params.C, OCTET), STATS_OCTETS)
    return [
        Launch(f"group_stats_partial_{type_name}", _clipped(chunks, bundles, params.N), THREADS, 0, params),
        Launch("group_stats_merge", _clipped(params.groups, params.N, 1), THREADS, 0, params),
    ]


def conv_launches(params: ConvParams, *, kind: str, tile: Tile, type_name: str) -> list[Launch]:
    """The convolution, followed by the sum over the splits where `params.splits` > 1; the last of them adds the branch where `params.rank` > 0.

    Args:
        params: All fields set, `partial` only where the sum is split.
        kind: `s4`, `u4` or `s8`.
        tile: From `tiles.TILES`.
        type_name: `f16` or `bf16`, of the output and the residual.
    """
    M = params.N * params.P * params.Q
    grid = tile.grid(M, params.K, params.splits)
    launches = [Launch(f"conv_{kind}_{tile.name}_{type_name}", grid, tile.threads, tile.shared_bytes, params)]
    if params.splits > 1:
        grid = _clipped(_ceil(M * _ceil(params.K, OCTET), THREADS), 1, 1)
        launches.append(Launch(f"reduce_{kind}_{type_name}", grid, THREADS, 0, params))
    if params.rank:  # the last of them has the epilogue
        launches[-1] = replace(launches[-1], entry=f"{launches[-1].entry}_branch", source=BRANCH)
    return launches


def entry_points(source: str = MAIN) -> list[str]:
    """Names of all kernels that a file in `cuda/` must define."""
    return {MAIN: _main_entry_points, ROTATED: _rotated_entry_points, BRANCH: _branch_entry_points, DOWN: _down_entry_points}[source]()


def _down_entry_points() -> list[str]:
    return [f"quantize_branch_{type_name}_i{bits}{rows}" for type_name in TYPES for bits in (4, 8) for rows in ("", "_rows")]


def _branch_entry_points() -> list[str]:
    return [f"{name}_{type_name}_branch" for name in _convolutions() for type_name in TYPES]


def _convolutions() -> list[str]:
    return [f"conv_{kind}_{tile.name}" for kind in CODE_FORMATS for tile in TILES] + [f"reduce_{kind}" for kind in CODE_FORMATS]


def _rotated_entry_points() -> list[str]:
    names = (f"quantize_last_{{}}_{prologue}_rotated" for prologue in ROTATED_PROLOGUES)
    return [name.format(f"{type_name}_i{bits}") for name in (*names, "quantize_rows_{}_rotated") for type_name in TYPES for bits in (4, 8)]


def _main_entry_points() -> list[str]:
    names = []
    for type_name in TYPES:
        names += [f"{name}_{type_name}" for name in _convolutions()]
        names += [f"quantize_last_{type_name}_i{bits}_{prologue}" for bits in (4, 8) for prologue in PROLOGUES.values()]
        names += [f"quantize_first_{type_name}_i{bits}_{prologue}" for bits in (4, 8) for prologue in FIRST_PROLOGUES]
        names += [f"quantize_rows_{type_name}_i{bits}" for bits in (4, 8)]
        names += [f"group_stats_partial_{type_name}", f"rotary_{type_name}"]
    return [*names, "group_stats_merge"]


def _clipped(x: int, y: int, z: int) -> tuple[int, int, int]:
    return min(x, LARGEST_GRID[0]), min(y, LARGEST_GRID[1]), min(z, LARGEST_GRID[2])


def _ceil(a: int, b: int) -> int:
    return -(-a // b)
