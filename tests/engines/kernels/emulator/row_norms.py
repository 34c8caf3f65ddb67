"""Random work for quantize_rows_*, and its codes in numpy: every sum in the order of params.h, float32 rounded step by step, compared bit for bit."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from tests.engines.kernels.emulator import STRUCTS, Emulator
from tests.engines.kernels.emulator.cases import GUARD, TYPES, ScaleTable, address, hadamard, to_float, to_type


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowNormalization:
    """One call of quantize_rows_*. `shifted` elements before x and the scale keep them from 16-byte alignment."""

    dtype: str
    bits: int
    N: int
    HW: int
    C: int
    unsigned: bool = False
    rms: bool = False
    affine: tuple[bool, bool] = (True, True)
    ada: tuple[bool, bool] = (False, False)
    mean: float = 0.0
    shifted: int = 0
    whole: bool = True  # False: a grid smaller than in params.h; the kernel strides over the rest
    rotation: int = 0
    seed: int = 0

    @property
    def entry(self) -> str:
        return f"quantize_rows_{self.dtype}_i{self.bits}{'_rotated' if self.rotation else ''}"

    @property
    def lanes(self) -> int:
        return min(lanes for lanes in (32, 64, 128, 256) if 32 * lanes >= self.C)

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        table = ScaleTable.drawn(g, self.N, self.bits, unsigned=self.unsigned)
        x = g.standard_normal((self.N, self.HW, self.C)).astype(np.float32) + np.float32(self.mean)
        for special in (np.nan, np.inf) if self.HW > 2 else ():
            x[tuple(g.integers(0, size) for size in x.shape)] = special
        held = np.zeros(x.size + self.shifted, np.uint16)
        held[self.shifted :] = to_type(x, self.dtype).ravel()
        gamma, beta = (g.standard_normal(self.C).astype(np.float32) if has else None for has in self.affine)
        # As chunks of a projection: sample n of the scale begins at n * stride, which need not be a multiple of 8.
        stride = 3 * self.C + self.shifted
        projection = to_type(g.standard_normal((self.N, stride)).astype(np.float32), self.dtype)
        scale, shift = ((projection[:, i * self.C : (i + 1) * self.C]) if has else None for i, has in enumerate(self.ada))

        with np.errstate(all="ignore"):
            value = to_float(held[self.shifted :].reshape(x.shape), self.dtype)
            if not self.rms:
                value = value - self.sums(value) / np.float32(self.C)
            value = value * (np.float32(1) / np.sqrt(self.sums(value * value) / np.float32(self.C) + np.float32(1e-5)))
            value = value * gamma if gamma is not None else value
            value = value + beta if beta is not None else value
            value = value * (np.float32(1) + to_float(scale, self.dtype)[:, None]) if scale is not None else value
            value = value + to_float(shift, self.dtype)[:, None] if shift is not None else value
            expected = np.rint(table.clipped(hadamard(value, self.rotation))).astype(np.int64)
        assert value.dtype == np.float32

        Cb = -(-self.C * self.bits // 128) * 16
        codes = np.full(self.N * self.HW * Cb + GUARD, 0xAD, np.uint8)
        params = STRUCTS["RowNormParams"](
            x=address(held) + 2 * self.shifted,
            codes=address(codes),
            **table.params(),
            gamma=address(gamma),
            beta=address(beta),
            scale=None if scale is None else scale.ctypes.data,
            shift=None if shift is None else shift.ctypes.data,
            N=self.N,
            HW=self.HW,
            C=self.C,
            Cb=Cb,
            scale_stride=stride,
            shift_stride=stride,
            lanes=self.lanes,
            rms=int(self.rms),
            rotation=self.rotation,
            eps=1e-5,
        )
        emulator.run(self.entry, params, (-(-self.HW * self.lanes // 256), self.N) if self.whole else (1, 1), 256)
        wrong = table.found(codes, x.shape) != expected
        assert not wrong.any(), (
            f"{int(wrong.sum())} of {wrong.size} codes differ, the first at {np.unravel_index(wrong.argmax(), wrong.shape)}"
        )

    def sums(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 sums of the last axis, thread by thread, then by halves of a warp, then warp by warp."""
        by_thread = [np.zeros(x.shape[:-1], np.float32) for _ in range(self.lanes)]
        for c in range(self.C):
            thread = c // 8 % self.lanes
            by_thread[thread] = by_thread[thread] + x[..., c]
        total = None
        for warp in range(0, self.lanes, 32):
            lanes = by_thread[warp : warp + 32]
            while len(lanes) > 1:
                half = len(lanes) // 2
                lanes = [lanes[i] + lanes[i + half] for i in range(half)]
            total = lanes[0] if total is None else total + lanes[0]
        return total[..., None]


def row_norms(seed: int) -> list[RowNormalization]:
    """Every kernel: rows of one to eight warps, whole octets or not, with each operand and without, far from 0, more tokens than a block has."""
    g = np.random.default_rng(seed)
    kinds = ((4, False), (4, True), (8, False))
    shapes = ((40, 0), (320, 0), (5, 0), (37, 0), (64, 1), (1040, 0), (1100, 3), (2056, 0), (5000, 0))
    return [
        RowNormalization(
            dtype=TYPES[int(g.integers(2))] if C > 100 else dtype,
            bits=bits,
            unsigned=unsigned,
            N=int(g.integers(1, 4)),
            HW=int(g.integers(1, 20)) if C < 1000 else int(g.integers(1, 5)),
            C=C,
            rms=bool(g.random() < 0.3),
            affine=(bool(g.integers(2)), bool(g.integers(2))),
            ada=(bool(g.integers(2)), bool(g.integers(2))),
            mean=float(g.choice([0.0, 50.0])),
            shifted=shifted,
            whole=bool(g.random() < 0.6),
            seed=int(g.integers(1 << 30)),
        )
        for C, shifted in shapes
        for dtype in (TYPES if C < 100 else TYPES[:1])
        for bits, unsigned in (kinds if C < 1000 else (kinds[int(g.integers(3))],))
    ]


def rotated_row_norms(seed: int) -> list[RowNormalization]:
    """Every kernel that rotates and every size of a block, of rows of one to eight warps."""
    g = np.random.default_rng(seed)
    shapes = ((6, 2), (20, 4), (40, 8), (320, 64), (1152, 128), (96, 32), (2304, 256), (48, 16), (4608, 256), (768, 256))
    return [
        RowNormalization(
            dtype=dtype,
            bits=int(g.choice([4, 8])),
            N=2,
            HW=int(g.integers(1, 20)) if C < 1000 else 3,
            C=C,
            rotation=rotation,
            ada=(bool(g.integers(2)), bool(g.integers(2))),
            whole=bool(g.random() < 0.6),
            seed=int(g.integers(1 << 30)),
        )
        for C, rotation in shapes
        for dtype in TYPES
    ]
