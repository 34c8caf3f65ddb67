"""Random work for quantize_branch_*: codes are those of the quantizer without a branch, byte for byte; the product with the branch's first matrix is numpy's.

Without a prologue all numbers are multiples of a power of two, so that the product is exact in any order and compared bit for bit. Behind a prologue, whose result is
rounded to 16 bits, it is compared with float64's.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from tests.engines.kernels.emulator import STRUCTS, Emulator
from tests.engines.kernels.emulator.cases import GUARD, TYPES, ScaleTable, address, gelu, to_float, to_type

PROLOGUES = ("plain", "silu", "norm", "norm_silu", "gelu", "gelu_tanh", "geglu", "rows")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BranchQuantization:
    """One call of quantize_branch_*."""

    dtype: str
    bits: int
    prologue: str
    N: int
    HW: int
    C: int
    rank: int
    groups: int = 1
    unsigned: bool = False
    rotation: int = 0
    scaled: bool = False
    whole: bool = True
    seed: int = 0

    @property
    def entry(self) -> str:
        return f"quantize_branch_{self.dtype}_i{self.bits}{'_rows' if self.prologue == 'rows' else ''}"

    @property
    def plain_entry(self) -> str:
        """The kernel that stores the same codes."""
        rows, rotated = self.prologue == "rows", "_rotated" if self.rotation else ""
        return f"quantize_{'rows' if rows else 'last'}_{self.dtype}_i{self.bits}{'' if rows else '_' + self.prologue}{rotated}"

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        table = ScaleTable.drawn(g, self.N, self.bits, unsigned=self.unsigned)
        x = g.integers(-16, 17, (self.N, self.HW, self.C * (2 if self.prologue == "geglu" else 1))).astype(np.float32) / 8
        down = g.integers(-3, 4, (self.rank, self.C)).astype(np.float32) / 4
        factor = 2.0 ** g.integers(-1, 2, (self.N, 2 * self.rank)).astype(np.float32)
        mean, rstd = (g.uniform(low, 2, (self.N, self.groups)).astype(np.float32) for low in (-2, 0.1))
        gamma, beta, scale, shift = self.columns(g)
        held, stored_down, stored_factor = (to_type(each, self.dtype) for each in (x, down, factor))
        stored_down = np.append(stored_down.ravel(), np.full(GUARD, 0x7FFF, np.uint16))  # no numbers behind it
        octets = -(-self.C * self.bits // 128) * 16 // self.bits
        low = np.full(self.N * self.HW * self.rank + GUARD, 0x7EAD, np.uint16)
        codes = [np.full(self.N * self.HW * octets * self.bits + GUARD, 0xAD, np.uint8) for _ in range(2)]
        fields = {
            **table.params(),
            **{name: address(each) for name, each in (("x", held), ("mean", mean), ("rstd", rstd), ("gamma", gamma), ("beta", beta))},
            **{name: getattr(self, name) for name in ("N", "HW", "C", "groups", "rotation")},
            "Cb": octets * self.bits,
            "lanes": min(lanes for lanes in (32, 64, 128, 256) if 32 * lanes >= self.C),
            "scale": address(scale),
            "shift": address(shift),
            "scale_stride": self.C,
            "shift_stride": self.C,
            "eps": 1e-5,
        }
        params = STRUCTS["BranchParams"](
            codes=address(codes[0]),
            down=address(stored_down),
            low=address(low),
            low_scale=address(stored_factor) if self.scaled else None,
            low_scale_stride=2 * self.rank,
            rank=self.rank,
            prologue=PROLOGUES.index(self.prologue) % 7,  # in the order of params.h's enum
            **fields,
        )
        emulator.run(self.entry, params, (-(-self.HW // 32), self.N) if self.whole else (1, 1), 256, 16640)

        plain = STRUCTS["RowNormParams" if self.prologue == "rows" else "QuantizeParams"]
        known = {name for name, _ in plain._fields_}
        params = plain(codes=address(codes[1]), **{name: each for name, each in fields.items() if name in known})
        per_block = 256 // fields["lanes"]
        grid = (-(-self.HW // per_block), self.N) if self.prologue == "rows" else (-(-self.HW * octets // 256), self.N)
        emulator.run(self.plain_entry, params, grid, 256)
        wrong = codes[0] != codes[1]
        assert not wrong.any(), f"{int(wrong.sum())} bytes of codes differ, the first at {int(wrong.argmax())}"

        assert (low[-GUARD:] == 0x7EAD).all(), "wrote behind the product"
        found = to_float(low[:-GUARD], self.dtype).reshape(self.N, self.HW, self.rank)
        value = self.values(x, mean, rstd, (gamma, beta, scale, shift))
        expected = value @ down.T.astype(np.float64) * (factor[:, None, : self.rank] if self.scaled else 1.0)
        if self.prologue == "plain":
            assert (to_type(found, self.dtype) == to_type(expected.astype(np.float32), self.dtype)).all()
        else:  # values of 8 or 11 bits, as random as their rounding
            error = np.abs(found - expected).max() / np.abs(expected).max()
            assert error < (2e-3 if self.dtype == "f16" else 2e-2), f"relative error {error:.1e}"

    def columns(self, g: np.random.Generator) -> list[NDArray | None]:
        """gamma, beta, and of tokens the scale and shift of each sample."""
        affine = [g.standard_normal(self.C).astype(np.float32) if g.integers(2) else None for _ in range(2)]
        of_samples = [
            to_type(g.standard_normal((self.N, self.C)).astype(np.float32), self.dtype) if g.integers(2) else None for _ in range(2)
        ]
        return [*affine, *(of_samples if self.prologue == "rows" else (None, None))]

    def values(self, x: NDArray[np.float32], mean: NDArray, rstd: NDArray, columns: tuple[NDArray | None, ...]) -> NDArray[np.float64]:
        """What is rounded to codes, in float64."""
        gamma, beta, scale, shift = columns
        value = x.astype(np.float64)
        if self.prologue == "rows":
            value = (value - value.mean(-1, keepdims=True)) / np.sqrt(value.var(-1, keepdims=True) + 1e-5)
        if "norm" in self.prologue:
            size = self.C // self.groups
            value = (value - np.repeat(mean, size, 1)[:, None]) * np.repeat(rstd, size, 1)[:, None]
        if "norm" in self.prologue or self.prologue == "rows":
            value = value * gamma if gamma is not None else value
            value = value + beta if beta is not None else value
            value = value * (1 + to_float(scale, self.dtype)[:, None]) if scale is not None else value
            value = value + to_float(shift, self.dtype)[:, None] if shift is not None else value
        if "silu" in self.prologue:
            value = value / (1 + np.exp(-value))
        if self.prologue == "gelu_tanh":
            value = value / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (value + 0.044715 * value**3)))
        if self.prologue == "gelu":
            value = gelu(x).astype(np.float64)
        if self.prologue == "geglu":
            value = x[..., : self.C].astype(np.float64) * gelu(x[..., self.C :])
        return value


def branch_quantizations(seed: int) -> list[BranchQuantization]:
    """Every kernel twice: ranks of one fragment to eight for a warp, one to three rounds of 256 channels, rows of one to four warps, rotations."""
    g = np.random.default_rng(seed)
    found = []
    for dtype in TYPES:
        for bits in (4, 8):
            for prologue in PROLOGUES:
                for large in (False, True):
                    groups = int(g.integers(1, 5))
                    rotates = "norm" not in prologue and bool(g.integers(2))
                    C = 256 * int(g.integers(1, 3)) if rotates and large else 8 * groups * int(g.integers(1, 18 if large else 5))
                    if prologue == "rows" and large:  # several warps' sums
                        C = 256 * int(g.integers(5, 10)) if rotates else 8 * int(g.integers(130, 300))
                    block = int(min(C & -C, 256)) if rotates else 0
                    found.append(
                        BranchQuantization(
                            dtype=dtype,
                            bits=bits,
                            prologue=prologue,
                            unsigned=bits == 4 and bool(g.integers(2)),
                            N=int(g.integers(1, 4)),
                            HW=int(g.integers(1, 80)),
                            C=C,
                            groups=groups if "norm" in prologue else 1,
                            rank=8 * int(g.integers(12, 33) if large else g.integers(1, 8)),
                            rotation=block,
                            scaled=bool(g.integers(2)),
                            whole=bool(g.random() < 0.7),
                            seed=int(g.integers(1 << 30)),
                        )
                    )
    return found
