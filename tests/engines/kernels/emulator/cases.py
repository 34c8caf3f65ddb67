"""Random work for the kernels and its result in numpy: integers summed exactly, float32 rounded step by step, everything compared bit for bit.

Nothing is shared with the code that packs for a real GPU: layouts are written out here a second time, from params.h.
As a program, `python -m tests.engines.kernels.emulator.cases LIBRARY SEED COUNT` checks a build of the kernels, and exits with 1 at the first difference.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.engines.kernels.emulator import CUDA, STRUCTS, Emulator

TABLE_ROWS = 5
GUARD = 32  # elements behind every output that must stay as they were
# (BM, BN) -> threads, bytes of dynamic shared memory; from the source's own table.
TILES = {
    (int(bm), int(bn)): (int(threads), int(shared))
    for bm, bn, threads, shared in re.findall(r"  X\((\d+), (\d+), \d+, \d+, (\d+), (\d+), \d+\)", (CUDA / "tiles.cuh").read_text())
}
KINDS = ("s4", "u4", "s8")
TYPES = ("f16", "bf16")


def bits_of(kind: str) -> int:
    return 8 if kind == "s8" else 4


def pack(codes: NDArray[np.integer], bits: int, padding: np.random.Generator | None = None) -> NDArray[np.uint8]:
    """Codes [..., C] as bytes [..., Cb]; the padding channels hold zeros, or what `padding` draws."""
    channels = -(-codes.shape[-1] * bits // 128) * 128 // bits
    shape = (*codes.shape[:-1], channels - codes.shape[-1])
    tail = np.zeros(shape, np.int64) if padding is None else padding.integers(0, 1 << bits, shape)
    whole = (np.concatenate([codes, tail], -1) & ((1 << bits) - 1)).astype(np.uint8)
    return np.ascontiguousarray(whole if bits == 8 else whole[..., 0::2] | whole[..., 1::2] << 4)


def unpacked(codes: NDArray[np.uint8], bits: int, *, unsigned: bool) -> NDArray[np.int64]:
    """The inverse of `pack`, [..., Cb] to [..., channels], the padding ones included."""
    if bits == 8:
        return codes.view(np.int8).astype(np.int64)
    nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(*codes.shape[:-1], -1).astype(np.int64)
    return nibbles if unsigned else (nibbles ^ 8) - 8


def to_type(x: NDArray[np.float32], dtype: str) -> NDArray[np.uint16]:
    """float32 rounded to the bits of float16 or bfloat16, half to even."""
    if dtype == "f16":
        with np.errstate(over="ignore"):  # beyond 65504 lies infinity, there as here
            return x.astype(np.float16).view(np.uint16)
    bits = x.astype(np.float32).view(np.uint32)
    return np.where(np.isnan(x), 0x7FFF, (bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def to_float(bits: NDArray[np.uint16], dtype: str) -> NDArray[np.float32]:
    return bits.view(np.float16).astype(np.float32) if dtype == "f16" else (bits.astype(np.uint32) << 16).view(np.float32)


# Of params.h's GELU, the lowest power first: read from the kernel, whose value is tested against the exact function.
POLYNOMIAL = [
    float(number)
    for number in re.search(r"P\[13\] = \{(.*?)\}", (CUDA / "quantize.cuh").read_text(), flags=re.S)[1].replace("f", "").split(",")
]


def fused(a: NDArray[np.float32], b: NDArray[np.float32] | float, c: NDArray[np.float32] | float) -> NDArray[np.float32]:
    """a * b + c rounded once; x86's long double has 64 bits, so that the second rounding is wrong once in 2^40 only."""
    product = a.astype(np.float64) * np.float64(np.float32(b))
    return (product.astype(np.longdouble) + np.asarray(c, np.float32).astype(np.longdouble)).astype(np.float32)


def gelu(x: NDArray[np.float32]) -> NDArray[np.float32]:
    s, p = fused(x * x, 0.08, -1.0), np.full_like(x, POLYNOMIAL[-1])
    for coefficient in POLYNOMIAL[-2::-1]:
        p = fused(p, s, coefficient)
    return np.where(np.abs(x) >= 5, np.maximum(x, 0), x * fused(x, p, 0.5)).astype(np.float32)


def hadamard(x: NDArray[np.float32], block: int) -> NDArray[np.float32]:
    """params.h's ROTATED of the last axis, each sum rounded to float32, channel by channel; a block of 0 is none."""
    if block == 0:
        return x
    log, channel = block.bit_length() - 1, np.arange(x.shape[-1])
    if log % 2:
        x = np.where(channel & 1, x[..., channel ^ 1] - x, x + x[..., channel ^ 1])
    for bit in range(log % 2, log, 2):
        low, high = 1 << bit, 2 << bit
        x = (x + x[..., channel ^ low]) + (x[..., channel ^ high] - x[..., channel ^ low ^ high])
    return x * np.float32(2.0 ** -((log + 1) // 2))


def address(array: NDArray | None) -> int | None:
    assert array is None or array.flags.c_contiguous
    return None if array is None else array.ctypes.data


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution:
    """One call of conv_* (and reduce_*). A Linear is kernel (1, 1) on W = 1."""

    kind: str
    tile: tuple[int, int]
    dtype: str
    N: int
    H: int
    W: int
    C: int
    K: int
    R: int = 1
    S: int = 1
    padding: int = 0
    stride: int = 1
    splits: int = 1
    bias: bool = True
    residual: bool = False
    sample_bias: bool = False
    gate: bool = False
    saturate: bool = False
    rank: int = 0
    short: int = 0  # elements by which the output is too small: for the sanitizer's own test
    seed: int = 0

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        P, Q = ((size + 2 * self.padding - taps) // self.stride + 1 for size, taps in ((self.H, self.R), (self.W, self.S)))
        return self.N, P, Q, self.K

    @classmethod
    def drawn(
        cls, g: np.random.Generator, kind: str, dtype: str, tiles: Sequence[tuple[int, int]] = tuple(TILES), *, branch: bool = False
    ) -> "Convolution":
        """A shape such as networks have, or odder; a few hundred thousand products at most."""
        while True:
            R, S = ((1, 1), (3, 3), (3, 3), (2, 2), (5, 5), (1, 3))[g.integers(6)]
            linear = (R, S) == (1, 1) and g.random() < 0.5
            drawn = cls(
                kind=kind,
                dtype=dtype,
                tile=tiles[g.integers(len(tiles))],
                N=int(g.integers(1, 6)),
                H=int(g.integers(1, 13)),
                W=1 if linear else int(g.integers(1, 13)),
                C=int(g.integers(1, 201)),
                K=int(g.choice([g.integers(1, 140), 8 * g.integers(1, 17)])),
                R=R,
                S=S,
                padding=0 if linear else int(g.integers(0, R // 2 + 2)),
                stride=1 if linear else int(g.integers(1, 3)),
                splits=int(g.integers(1, 5)) if not branch or g.random() < 0.4 else 1,
                bias=bool(g.integers(2)),
                residual=bool(g.integers(2)),
                sample_bias=bool(g.integers(2)),
                gate=bool(g.integers(2)),
                saturate=bool(g.integers(2)),
                rank=8 * int(g.integers(1, 14)) if branch else 0,
                seed=int(g.integers(1 << 30)),
            )
            n, P, Q, K = drawn.out_shape
            if P > 0 and Q > 0 and n * P * Q * K * R * S * drawn.C < 2_000_000:
                return drawn

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        bits = bits_of(self.kind)
        low, high = -(1 << bits - 1), (1 << bits - 1) - 1
        qmin = g.integers(-15, 1, TABLE_ROWS).astype(np.int32) if self.kind == "u4" else np.full(TABLE_ROWS, low, np.int32)
        offset = qmin if self.kind == "u4" else np.zeros(TABLE_ROWS, np.int32)
        row = g.integers(0, TABLE_ROWS, self.N).astype(np.int32)
        per_sample = (slice(None), None, None, None)
        n = g.integers(0, 1 << bits, (self.N, self.H, self.W, self.C)) + qmin[row][per_sample]
        w = g.integers(low, high + 1, (self.K, self.R, self.S, self.C))
        codes, weight = pack(n - offset[row][per_sample], bits, padding=g), pack(w, bits)
        zero = pack(np.repeat(-offset[:, None], 128 // bits, 1), bits)
        act_scale = g.uniform(0.01, 0.1, TABLE_ROWS).astype(np.float32)
        weight_scale = g.uniform(1e-3, 1e-2, self.K).astype(np.float32)
        if self.rank:  # powers of two, so that the branch is exact in any order
            act_scale, weight_scale = (
                2.0 ** g.integers(low, low + 2, len(old)).astype(np.float32) for low, old in ((-3, act_scale), (-5, weight_scale))
            )
        weight_sum = w.sum((1, 2, 3)).astype(np.int32)
        pitch = 8 * int(g.integers(0, 3))  # columns of `low` that belong to other layers
        of_branch, thin, up = self.branch(g, pitch)
        residual = to_type(g.standard_normal(self.out_shape).astype(np.float32), self.dtype) if self.residual else None

        y = self.sums(n, w).astype(np.float32) * (act_scale[row][per_sample] * weight_scale)
        y = (y + of_branch).astype(np.float32)
        # Half of the channels' biases cancel the product at one pixel: what is left there is the product's own rounding, which a fused multiply-add would change.
        cancelling = -y[tuple(g.integers(0, size) for size in self.out_shape[:3])]
        bias = np.where(g.random(self.K) < 0.5, cancelling, g.standard_normal(self.K)).astype(np.float32) if self.bias else None
        if bias is not None:
            y = y + bias
        # As chunks of a projection; the last channel's gate makes float16 overflow, and one value is no number.
        stride = 2 * self.K + int(g.integers(0, 2)) * 8 + int(g.integers(0, 2))
        projection = g.standard_normal((self.N, stride)).astype(np.float32)
        projection[:, 2 * self.K - 1] = g.choice([3e4, -3e4, np.nan])
        sample_bias = to_type(projection, self.dtype)[:, : self.K] if self.sample_bias else None
        gate = to_type(projection, self.dtype)[:, self.K : 2 * self.K] if self.gate else None
        with np.errstate(all="ignore"):
            if sample_bias is not None:
                y = y + to_float(np.ascontiguousarray(sample_bias), self.dtype)[:, None, None]
            if gate is not None:
                y = y * to_float(np.ascontiguousarray(gate), self.dtype)[:, None, None]
            if residual is not None:
                y = y + to_float(residual, self.dtype)
            if self.saturate:
                y = np.clip(y, -65504, 65504)

        _, P, Q, K = self.out_shape
        M = self.N * P * Q
        out = np.full(M * K + (0 if self.short else GUARD) - self.short, 0x7EAD, np.uint16)
        partial = np.full(self.splits * M * K + GUARD, 0x7EADBEEF, np.int32) if self.splits > 1 else None
        u4 = self.kind == "u4"
        params = STRUCTS["ConvParams"](
            codes=address(codes),
            weight=address(weight),
            zero=address(zero),
            row=address(row),
            act_scale=address(act_scale),
            qmin=address(qmin) if u4 else None,
            weight_scale=address(weight_scale),
            weight_sum=address(weight_sum) if u4 else None,
            bias=address(bias),
            sample_bias=None if sample_bias is None else sample_bias.ctypes.data,
            gate=None if gate is None else gate.ctypes.data,
            residual=address(residual),
            sample_bias_stride=stride,
            gate_stride=stride,
            saturate=int(self.saturate),
            low=address(thin),
            up=address(up),
            rank=self.rank,
            low_stride=self.rank + pitch,
            out=address(out),
            partial=address(partial),
            **{name: getattr(self, name) for name in ("N", "H", "W", "K", "R", "S", "padding", "stride", "splits")},
            Cb=codes.shape[-1],
            P=P,
            Q=Q,
        )
        threads, shared = TILES[self.tile]
        BM, BN = self.tile
        branch = "_branch" if self.rank else ""
        entry = f"conv_{self.kind}_{BM}x{BN}_{self.dtype}{'' if self.splits > 1 else branch}"
        emulator.run(entry, params, (-(-M // BM), -(-K // BN), self.splits), threads, shared)
        if self.splits > 1:
            assert (partial[-GUARD:] == 0x7EADBEEF).all(), "wrote behind the partial sums"
            emulator.run(f"reduce_{self.kind}_{self.dtype}{branch}", params, (-(-M * -(-K // 8) // 256), 1), 256)
        assert (out[M * K :] == 0x7EAD).all(), "wrote behind the output"
        wrong = out[: M * K] != to_type(y, self.dtype).ravel()
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.size} outputs differ, the first at {int(wrong.argmax())}"

    def branch(
        self, g: np.random.Generator, pitch: int
    ) -> tuple[NDArray[np.float32] | float, NDArray[np.uint16] | None, NDArray[np.uint16] | None]:
        """The branch's share of the output, and the operands it is the product of, with NaN behind them."""
        if not self.rank:
            return 0.0, None, None
        _, P, Q, K = self.out_shape
        values = [
            g.integers(-4, 5, (rows, self.rank)).astype(np.float32) * np.float32(scale)
            for rows, scale in ((self.N * P * Q, 0.25), (K, 0.125))
        ]
        values[0] = np.append(values[0], np.full((len(values[0]), pitch), np.nan, np.float32), 1)
        stored = [np.append(to_type(value, self.dtype).ravel(), np.full(GUARD, 0x7FFF, np.uint16)) for value in values]
        return (values[0][:, : self.rank] @ values[1].T).reshape(self.out_shape), *stored

    def sums(self, n: NDArray[np.int64], w: NDArray[np.int64]) -> NDArray[np.int64]:
        """The convolution's integer sums; float64 is exact below 2^53."""
        around = ((0, 0), (self.padding, self.padding), (self.padding, self.padding), (0, 0))
        x, total = np.pad(n, around).astype(np.float64), np.zeros(self.out_shape)
        _, P, Q, _ = self.out_shape
        for r in range(self.R):
            for s in range(self.S):
                taken = x[:, r : r + self.stride * (P - 1) + 1 : self.stride, s : s + self.stride * (Q - 1) + 1 : self.stride]
                total += taken @ w[:, r, s].T.astype(np.float64)
        return total.astype(np.int64)


@dataclasses.dataclass(frozen=True)
class ScaleTable:
    """What every quantizer takes: the scales and ranges of each row of a table, and the row of each sample [N]."""

    row: NDArray[np.int32]
    inv_scale: NDArray[np.float32]
    qmin: NDArray[np.int32]
    qmax: NDArray[np.int32]
    bits: int
    unsigned: bool

    @classmethod
    def drawn(cls, g: np.random.Generator, samples: int, bits: int, *, unsigned: bool) -> "ScaleTable":
        row = g.integers(0, TABLE_ROWS, samples).astype(np.int32)
        inv_scale = g.uniform(1, 20, TABLE_ROWS).astype(np.float32)
        qmin = g.integers(-15 if unsigned else -(1 << bits - 1), 1, TABLE_ROWS).astype(np.int32)
        qmax = qmin + (1 << bits) - 1 if unsigned else np.full(TABLE_ROWS, (1 << bits - 1) - 1, np.int32)
        return cls(row, inv_scale, qmin, qmax, bits, unsigned)

    def params(self) -> dict[str, int | None]:
        """The fields of a struct of params.h."""
        columns = {name: address(getattr(self, name)) for name in ("row", "inv_scale", "qmin", "qmax")}
        return columns | {"unsigned_codes": int(self.unsigned)}

    def of_samples(self, column: NDArray) -> NDArray:
        return column[self.row][:, None, None]

    def clipped(self, value: NDArray[np.float32]) -> NDArray[np.float32]:
        """What is rounded to codes, of value [N, HW, C]; NaN becomes the lowest code."""
        scaled, low = value * self.of_samples(self.inv_scale), self.of_samples(self.qmin)
        return np.where(np.isnan(scaled), low, np.clip(scaled, low, self.of_samples(self.qmax)))

    def found(self, codes: NDArray[np.uint8], shape: tuple[int, int, int]) -> NDArray[np.int64]:
        """The integers [N, HW, C] in the bytes that a kernel wrote, whose padding channels and guard are checked."""
        assert (codes[-GUARD:] == 0xAD).all(), "wrote behind the codes"
        channels = shape[-1]
        found = unpacked(codes[:-GUARD].reshape(*shape[:2], -1), self.bits, unsigned=self.unsigned)
        assert (found[..., channels:] == 0).all(), "padding channels are not 0"
        return found[..., :channels] + (self.of_samples(self.qmin) if self.unsigned else 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """One call of quantize_*."""

    layout: str
    dtype: str
    bits: int
    prologue: str
    N: int
    HW: int
    C: int
    groups: int = 1
    unsigned: bool = False
    affine: bool = True
    rotation: int = 0
    seed: int = 0

    @property
    def entry(self) -> str:
        return f"quantize_{self.layout}_{self.dtype}_i{self.bits}_{self.prologue}{'_rotated' if self.rotation else ''}"

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        table = ScaleTable.drawn(g, self.N, self.bits, unsigned=self.unsigned)
        table.inv_scale[0] = 1.0  # row 0 meets exact ties
        x = g.standard_normal((self.N, self.HW, self.C * (2 if self.prologue == "geglu" else 1))).astype(np.float32) * g.choice([0.5, 3.0])
        x[g.random(x.shape) < 0.2] = 0.5 * g.integers(-20, 20)  # ties, and one value in many places
        for special in (np.nan, np.inf, -np.inf, -0.0):
            x[tuple(g.integers(0, size) for size in x.shape)] = special
        stored = to_type(x, self.dtype)
        mean, rstd = (g.uniform(low, 2, (self.N, self.groups)).astype(np.float32) for low in (-2, 0.1))
        gamma, beta = (g.standard_normal(self.C).astype(np.float32) if self.affine else None for _ in range(2))

        with np.errstate(all="ignore"):
            value = to_float(stored, self.dtype)
            if "norm" in self.prologue:
                size = self.C // self.groups
                value = (value - np.repeat(mean, size, 1)[:, None]) * np.repeat(rstd, size, 1)[:, None]
                value = value * gamma + beta if self.affine else value
            if "silu" in self.prologue:
                value = value / (np.float32(1) + np.exp(-value))
            if self.prologue == "gelu_tanh":
                u = value * (1 + np.float32(0.044715) * value * value)
                value = value / (np.float32(1) + np.exp(np.float32(-2 * np.sqrt(2 / np.pi)) * u))
            if self.prologue == "gelu":
                value = gelu(value)
            if self.prologue == "geglu":
                value = value[..., : self.C] * gelu(value[..., self.C :])
            clipped = table.clipped(hadamard(value, self.rotation))
            expected = np.rint(clipped).astype(np.int64)

        Cb = -(-self.C * self.bits // 128) * 16
        codes = np.full(self.N * self.HW * Cb + GUARD, 0xAD, np.uint8)
        held = np.ascontiguousarray(stored if self.layout == "last" else stored.transpose(0, 2, 1))
        params = STRUCTS["QuantizeParams"](
            x=address(held),
            codes=address(codes),
            **table.params(),
            mean=address(mean),
            rstd=address(rstd),
            gamma=address(gamma),
            beta=address(beta),
            N=self.N,
            HW=self.HW,
            C=self.C,
            Cb=Cb,
            groups=self.groups,
            rotation=self.rotation,
        )
        octets = Cb // self.bits
        # Sometimes a grid smaller than in params.h: the kernels stride over the rest.
        grid = (-(-self.HW * octets // 256), self.N) if self.layout == "last" else (-(-self.HW // 64), -(-octets * 8 // 64), self.N)
        grid = (1, 1, 1) if g.random() < 0.3 else grid
        emulator.run(self.entry, params, grid, 256)
        found = table.found(codes, (self.N, self.HW, self.C))
        # exp2 on a GPU, exp2f here and numpy's exp differ in the last bits: at a tie the code may fall to either side. The rest is exact.
        near_tie = np.abs(np.abs(clipped - np.floor(clipped)) - 0.5) < (1e-3 if self.rotation else 1e-4)
        allowed = near_tie & (np.abs(found - expected) == 1) if self.prologue in ("silu", "norm_silu", "gelu_tanh") else False
        wrong = (found != expected) & ~np.asarray(allowed)
        at = np.unravel_index(wrong.argmax(), wrong.shape)
        assert not wrong.any(), f"{int(wrong.sum())} of {wrong.size} codes differ, the first at {at}: {found[at]}, expected {expected[at]}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Statistics:
    """One call of group_stats_partial_* and group_stats_merge."""

    dtype: str
    N: int
    HW: int
    C: int
    groups: int
    chunk: int
    mean: float = 0.0
    slope: float = 0.0  # of the channels' means, from the first pixel to the last
    whole: bool = True  # False: a grid smaller than in params.h; the kernels stride over the rest
    seed: int = 0

    @property
    def entry(self) -> str:
        return f"group_stats_partial_{self.dtype}"

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        drift = self.slope * np.linspace(0, 1, self.HW)[:, None] * g.choice([-1, 1], self.C)
        x = to_type((g.standard_normal((self.N, self.HW, self.C)) + self.mean + drift).astype(np.float32), self.dtype)
        mean, rstd = (np.full(self.N * self.groups + GUARD, 7.5, np.float32) for _ in range(2))
        chunks = -(-self.HW // self.chunk)
        partial = np.full(self.N * chunks * self.C * 2 + GUARD, 7.5, np.float32)
        params = STRUCTS["StatsParams"](x=address(x), partial=address(partial), mean=address(mean), rstd=address(rstd), eps=1e-5)
        params.N, params.HW, params.C, params.groups, params.chunk = self.N, self.HW, self.C, self.groups, self.chunk
        emulator.run(self.entry, params, (chunks, -(-self.C // 512), self.N) if self.whole else (1, 1, 1), 256)
        assert (partial[-GUARD:] == 7.5).all(), "wrote behind the partial statistics"
        emulator.run("group_stats_merge", params, (self.groups, self.N) if self.whole else (1, 1), 256)
        assert (mean[-GUARD:] == 7.5).all() and (rstd[-GUARD:] == 7.5).all(), "wrote behind the statistics"
        exact = to_float(x, self.dtype).astype(np.float64).reshape(self.N, self.HW, self.groups, -1)
        # float32 sums of a few dozen numbers a thread, about one of them: a few units in the last place of the mean, and of the variance about it.
        scale = np.abs(exact).mean()
        np.testing.assert_allclose(mean[:-GUARD], exact.mean((1, 3)).ravel(), rtol=0, atol=2e-6 * scale + 1e-7)
        np.testing.assert_allclose(rstd[:-GUARD], 1 / np.sqrt(exact.var((1, 3)).ravel() + 1e-5), rtol=1e-5)


def quantizations(seed: int) -> list[Quantization]:
    """Every quantize kernel, at shapes that take 16-byte loads and at shapes that cannot."""
    g = np.random.default_rng(seed)
    found = []
    for layout, prologues in (("last", ("plain", "silu", "norm", "norm_silu", "gelu", "gelu_tanh", "geglu")), ("first", ("plain", "silu"))):
        for prologue in prologues:
            for dtype in TYPES:
                for bits, unsigned in ((4, False), (4, True), (8, False)):
                    for wide in (True, False):
                        size = int(g.integers(1, 9)) * (4 if wide else 1)
                        groups = int(g.integers(1, 9)) * (2 if wide else 1)
                        shape = {"N": int(g.integers(1, 4)), "HW": int(g.integers(1, 90)), "C": size * groups, "groups": groups}
                        kernel = {"layout": layout, "dtype": dtype, "bits": bits, "prologue": prologue, "unsigned": unsigned}
                        found.append(Quantization(**kernel, **shape, affine=bool(g.integers(2)), seed=int(g.integers(1 << 30))))
    return found


def rotated_quantizations(seed: int) -> list[Quantization]:
    """Every quantizer that rotates and every size of a block, one to three blocks to a pixel, warps with lanes past the last pixel."""
    g = np.random.default_rng(seed)
    kinds = ((4, False), (4, True), (8, False))
    return [
        Quantization(
            layout="last",
            dtype=dtype,
            bits=bits,
            unsigned=unsigned,
            prologue=prologue,
            rotation=1 << int(log),
            N=int(g.integers(1, 4)),
            HW=int(g.integers(1, 40)),
            C=int(g.integers(1, 4)) << int(log),
            seed=int(g.integers(1 << 30)),
        )
        for prologue in ("plain", "silu", "gelu", "gelu_tanh", "geglu")
        for dtype in TYPES
        for (bits, unsigned), logs in zip(kinds, np.array_split(g.permutation(np.arange(1, 9)), 3), strict=True)
        for log in logs
    ]


def statistics(seed: int) -> list[Statistics]:
    """Groups of one channel to all, octets that are whole and that are not, more octets than a block has, fewer pixels than lanes, and a last chunk of one pixel."""
    shapes = ((64, 8), (40, 4), (320, 32), (30, 30), (300, 1), (64, 32), (7, 1), (600, 2))
    g = np.random.default_rng(seed)
    drawn = [
        Statistics(
            dtype=dtype,
            N=int(g.integers(1, 3)),
            HW=int(g.integers(1, 120)),
            C=C,
            groups=groups,
            chunk=int(g.integers(1, 60)),
            mean=mean,
            slope=slope,
            whole=bool(g.random() < 0.7),
            seed=int(g.integers(1 << 30)),
        )
        for C, groups in shapes
        for dtype, mean, slope in (("f16", 0.0, 9.0), ("f16", 100.0, 0.0), ("bf16", -3.0, 3.0))
    ]
    wide = [Statistics(dtype="f16", N=2, HW=65, C=520, groups=65, chunk=16, mean=10.0, whole=whole) for whole in (True, False)]
    return drawn + wide


def check_build(library: pathlib.Path, seed: int, count: int) -> None:
    """`count` convolutions of each kind, the quantizations, the statistics and the norms of tokens, all in float16, as far as the library has their kernels."""
    from tests.engines.kernels.emulator.branches import branch_quantizations
    from tests.engines.kernels.emulator.rotations import rotations  # which are built on this file
    from tests.engines.kernels.emulator.row_norms import rotated_row_norms, row_norms

    emulator, g = Emulator(library), np.random.default_rng(seed)
    for case in (
        *quantizations(seed),
        *rotated_quantizations(seed),
        *statistics(seed),
        *row_norms(seed),
        *rotated_row_norms(seed),
        *rotations(seed),
    ):
        if case.dtype == "f16" and emulator.has(case.entry):
            case.check(emulator)
    for case in branch_quantizations(seed):
        if case.dtype == "f16" and emulator.has(case.entry):
            case.check(emulator)
    tiles = [(BM, BN) for BM, BN in TILES if emulator.has(f"conv_s4_{BM}x{BN}_f16")]
    for _ in range(count if tiles else 0):
        for kind in KINDS:
            Convolution.drawn(g, kind, "f16", tiles).check(emulator)
    tiles = [(BM, BN) for BM, BN in TILES if emulator.has(f"conv_s4_{BM}x{BN}_f16_branch")]
    for _ in range(count if tiles else 0):
        for kind in KINDS:
            Convolution.drawn(g, kind, "f16", tiles, branch=True).check(emulator)


if __name__ == "__main__":
    check_build(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
