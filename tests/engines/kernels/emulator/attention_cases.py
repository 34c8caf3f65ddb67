"""Random attention for the kernels and its result in numpy. Sums of codes and the codes themselves are exact; powers are approximate, unless they are powers of two.

As a program, `python -m tests.engines.kernels.emulator.attention_cases LIBRARY SEED COUNT` checks a build of the kernels, and exits with 1 at the first difference.
"""

import dataclasses
import pathlib
import re
import sys

import numpy as np
from numpy.typing import NDArray

from tests.engines.kernels.emulator import CUDA, STRUCTS, Emulator
from tests.engines.kernels.emulator.cases import GUARD, TYPES, address, to_float, to_type

LOG2_E = np.float32(1.4426950408889634)
# Width of a head -> queries of a block, threads, bytes of dynamic shared memory; from the source's own table.
WIDTHS = {
    int(width): (16 * int(warps), int(threads), int(shared))
    for width, warps, threads, shared in re.findall(r"  X\((\d+), (\d+), \d+, (\d+), (\d+), \d+\)", (CUDA / "attention.cu").read_text())
}
SPARE_TOKENS = 3  # of NaN behind each operand
ROUNDING = {"f16": 2.0**-11, "bf16": 2.0**-8}  # of one number to the type


def head_codes(x: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Codes of float32 [..., D], as float32, and the scale of each token, as params.h has them."""
    with np.errstate(all="ignore"):
        largest = np.maximum(np.nanmax(np.abs(x), -1, initial=0.0), np.float32(1e-30)).astype(np.float32)
        scaled = x * (np.float32(127) / largest)[..., None]
        clipped = np.where(np.isnan(scaled), np.float32(-127), np.clip(scaled, -127, 127))
    return np.rint(clipped), largest / np.float32(127)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """One call of the three kernels.

    Attributes:
        exact: Values for which all powers are powers of two and no sum is rounded, so that bits are compared.
        gap: Elements between the tokens of the operands, a multiple of 8.
        D: Elements of a head; `width` is the kernel's.
    """

    width: int
    dtype: str
    B: int
    H: int
    Lq: int
    Lk: int
    D: int
    gap: int = 0
    chunk: int = 16
    exact: bool = True
    seed: int = 0

    @classmethod
    def drawn(cls, g: np.random.Generator, width: int, dtype: str) -> "Attention":
        """A few hundred tokens at most."""
        narrower = [w for w in WIDTHS if w < width]
        return cls(
            width=width,
            dtype=dtype,
            B=int(g.integers(1, 3)),
            H=int(g.integers(1, 3)),
            Lq=int(g.integers(1, 150)),
            Lk=int(g.choice([g.integers(1, 150), 64 * g.integers(1, 3)])),
            D=8 * int(g.integers(max(narrower, default=0) // 8 + 1, width // 8 + 1)),
            gap=8 * int(g.integers(3)),
            chunk=int(g.integers(16, 80)),
            exact=bool(g.integers(2)),
            seed=int(g.integers(1 << 30)),
        )

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        query, key, value = self.values(g)
        stored = [self.strided(x) for x in (query, key, value)]
        query, key, value = (to_float(to_type(x, self.dtype), self.dtype) for x in (query, key, value))
        codes_width, tokens, chunks = -(-self.width // 32) * 32, -(-self.Lk // 64) * 64, -(-self.Lk // self.chunk)
        heads = self.B * self.H
        key_sums = np.full(heads * chunks * self.D + GUARD, 7.5, np.float32)
        key_codes = np.full(heads * tokens * codes_width + GUARD, 0x5A, np.int8)
        key_scale = np.full(heads * tokens + GUARD, 7.5, np.float32)
        out = np.full(self.B * self.Lq * self.H * self.D + GUARD, 0x7EAD, np.uint16)
        params = STRUCTS["AttentionParams"](
            query=stored[0].ctypes.data,
            key=stored[1].ctypes.data,
            value=stored[2].ctypes.data,
            out=address(out),
            key_sums=address(key_sums),
            key_codes=address(key_codes),
            key_scale=address(key_scale),
            H=self.H,
            Lq=self.Lq,
            Lk=self.Lk,
            D=self.D,
            Cb=codes_width,
            tokens=tokens,
            chunk=self.chunk,
            chunks=chunks,
            factor=self.factor,
        )
        for name, array in zip(("query", "key", "value"), stored, strict=True):
            for axis, stride in zip(("batch", "token", "head"), array.strides, strict=False):
                setattr(params, f"{name}_{axis}", stride // 2)

        emulator.run(f"attention_key_sums_{self.dtype}", params, (chunks, self.H, self.B), 256)
        assert (key_sums[-GUARD:] == 7.5).all(), "wrote behind the sums"
        sums = key_sums[:-GUARD].reshape(self.B, self.H, chunks, self.D)
        np.testing.assert_allclose(
            sums.sum(2, dtype=np.float64), key.sum(2, dtype=np.float64), rtol=0, atol=1e-6 * np.abs(key).sum(2).max()
        )

        emulator.run(f"attention_key_codes_{self.dtype}", params, (tokens // 64, self.H, self.B), 256)
        assert (key_codes[-GUARD:] == 0x5A).all() and (key_scale[-GUARD:] == 7.5).all(), "wrote behind the codes"
        mean = np.zeros((self.B, self.H, self.D), np.float32)
        for chunk in range(chunks):
            mean = mean + sums[:, :, chunk]
        n_k, s_k = head_codes(key - (mean / np.float32(self.Lk))[:, :, None])
        found = key_codes[:-GUARD].reshape(self.B, self.H, tokens, codes_width)
        assert (found[:, :, : self.Lk, : self.D] == n_k).all(), "codes of keys differ"
        assert not found[:, :, self.Lk :].any() and not found[..., self.D :].any(), "codes behind the keys are not 0"
        assert (key_scale[:-GUARD].reshape(self.B, self.H, tokens)[:, :, : self.Lk] == s_k).all(), "scales of keys differ"

        queries, threads, shared = WIDTHS[self.width]
        emulator.run(f"attention_s8_{self.width}_{self.dtype}", params, (-(-self.Lq // queries), self.H, self.B), threads, shared)
        assert (out[-GUARD:] == 0x7EAD).all(), "wrote behind the output"
        n_q, s_q = head_codes(query)
        u = (n_q.astype(np.float64) @ n_k.astype(np.float64).swapaxes(-1, -2)).astype(np.float32) * s_k[:, :, None]
        r = (s_q * self.factor)[..., None]
        self.compare(to_float(out[:-GUARD], self.dtype).reshape(self.B, self.Lq, self.H, self.D).swapaxes(1, 2), u, r, value)

    def compare(self, found: NDArray, u: NDArray, r: NDArray, value: NDArray) -> None:
        exponent = (u.astype(np.float64) - u.max(-1, keepdims=True)) * r
        p = np.exp2(exponent)
        total, weighted = p.sum(-1, keepdims=True), p @ value.astype(np.float64)
        if self.exact:
            assert (exponent == np.rint(exponent)).all() and exponent.min() >= -14, "the case is not exact"
            inverse = np.float32(1) / total.astype(np.float32)
            right = to_float(to_type(weighted.astype(np.float32) * inverse, self.dtype), self.dtype)
            wrong = found != right
            assert not wrong.any(), (
                f"{int(wrong.sum())} of {wrong.size} outputs differ, the first at {np.unravel_index(wrong.argmax(), wrong.shape)}"
            )
            return
        # p and the output are rounded to the type; the rest is float32, whose errors are smaller.
        allowed = 1.1 * ROUNDING[self.dtype] * ((p @ np.abs(value)) / total + np.abs(weighted / total)) + 1e-6
        error = np.abs(found - weighted / total)
        assert (error <= allowed).all(), f"an output is off by {float((error / allowed).max()):.2f} of what rounding allows"

    @property
    def factor(self) -> np.float32:
        return np.float32(1) if self.exact else np.float32(self.D**-0.5) * LOG2_E

    def values(self, g: np.random.Generator) -> tuple[NDArray[np.float32], ...]:
        """Queries, keys and values [B, H, L, D]."""
        shapes = [(self.B, self.H, length, self.D) for length in (self.Lq, self.Lk, self.Lk)]
        if not self.exact:
            query, key, value = (g.standard_normal(shape).astype(np.float32) for shape in shapes)
            key += 3 * g.standard_normal((self.B, self.H, 1, self.D)).astype(np.float32)  # what smoothing is for
            query[0, 0, 0] = 0  # a row of zeros attends to all keys alike
            return 2 * query, key, value
        # Codes are the values, and scales are 1: 127 in element 0 of a query, where keys are 0, and in element 1 of a key, where queries are 0. Keys come in
        # pairs of opposite sign, so that their mean is 0. Two more elements of a query are not 0: scores are integers of small range.
        query, key = (np.zeros(shape, np.float32) for shape in shapes[:2])
        query[..., 0] = 127
        for place in np.ndindex(query.shape[:3]):
            query[(*place, g.choice(np.arange(2, self.D), 2, replace=False))] = g.choice([-1, 1], 2)
        half = self.Lk // 2
        key[..., :half, :] = g.integers(-3, 4, (self.B, self.H, half, self.D))
        key[..., :half, 0], key[..., :half, 1] = 0, 127
        key[..., half : 2 * half, :] = -key[..., :half, :]
        if self.Lk % 2:
            key[..., -1, :] = 0
        for head in np.ndindex(key.shape[:2]):
            key[head] = key[head][g.permutation(self.Lk)]
        return query, key, g.integers(-8, 9, shapes[2]).astype(np.float32)

    def strided(self, x: NDArray[np.float32]) -> NDArray[np.uint16]:
        """Bits as [B, L, H, D] with gaps, and spare tokens of NaN, which no kernel may use."""
        shape = (self.B, x.shape[2] + SPARE_TOKENS, self.H * self.D + self.gap)
        whole = np.full(shape, 0x7FFF, np.uint16)
        view = np.lib.stride_tricks.as_strided(whole, (self.B, shape[1], self.H, self.D), (*whole.strides[:2], 2 * self.D, 2))
        view[:, : x.shape[2]] = to_type(x, self.dtype).swapaxes(1, 2)
        return view


def check_build(library: pathlib.Path, seed: int, count: int) -> None:
    """`count` cases of each width that the library has, in float16."""
    emulator, g = Emulator(library), np.random.default_rng(seed)
    for width in WIDTHS:
        for _ in range(count if emulator.has(f"attention_s8_{width}_f16") else 0):
            Attention.drawn(g, width, "f16").check(emulator)


__all__ = ["TYPES", "WIDTHS", "Attention", "check_build"]

if __name__ == "__main__":
    check_build(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
