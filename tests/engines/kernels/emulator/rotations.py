"""Random work for rotary_*, and its result in numpy, float32 rounded step by step, compared bit for bit."""

import dataclasses

import numpy as np

from tests.engines.kernels.emulator import STRUCTS, Emulator
from tests.engines.kernels.emulator.cases import GUARD, TYPES, address, to_float, to_type


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotation:
    """One call of rotary_*."""

    dtype: str
    N: int
    L: int
    H: int
    D: int
    seed: int = 0

    @property
    def entry(self) -> str:
        return f"rotary_{self.dtype}"

    def check(self, emulator: Emulator) -> None:
        g = np.random.default_rng(self.seed)
        x = to_type(g.standard_normal((self.N, self.L, self.H, self.D)).astype(np.float32), self.dtype)
        cosine, sine = g.standard_normal((2, self.L, self.D)).astype(np.float32)
        value, (c, s) = to_float(x, self.dtype), (each[:, None] for each in (cosine, sine))
        expected = np.empty_like(value)
        expected[..., ::2] = value[..., ::2] * c[..., ::2] - value[..., 1::2] * s[..., ::2]
        expected[..., 1::2] = value[..., 1::2] * c[..., 1::2] + value[..., ::2] * s[..., 1::2]
        out = np.full(x.size + GUARD, 0x7EAD, np.uint16)
        params = STRUCTS["RotaryParams"](x=address(x), cosine=address(cosine), sine=address(sine), out=address(out))
        params.N, params.L, params.H, params.D = x.shape
        emulator.run(self.entry, params, (-(-x.size // 8 // 256) if g.random() < 0.5 else 1, 1), 256)
        assert (out[-GUARD:] == 0x7EAD).all(), "wrote behind the output"
        assert (out[:-GUARD] == to_type(expected, self.dtype).ravel()).all()


def rotations(seed: int) -> list[Rotation]:
    """Heads of one octet to sixteen, one or several samples, heads and tokens."""
    g = np.random.default_rng(seed)
    return [
        Rotation(dtype=dtype, D=D, seed=int(g.integers(1 << 30)), **{name: int(g.integers(1, 6)) for name in ("N", "L", "H")})
        for dtype in TYPES
        for D in (8, 24, 64, 128)
    ]
