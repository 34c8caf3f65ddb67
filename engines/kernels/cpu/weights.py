"""Weights in the order in which the kernels of `cpu/` read them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from engines.kernels.cpu.launch import LANES

OFFSET = 128  # products are of codes + 128, which are unsigned
FILTER = torch.tensor([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], dtype=torch.int32)  # twice the source's G, so that it is of integers
LEAST_CHANNELS = 32  # below, transforming costs more than it saves


@dataclass(frozen=True)
class Arranged:
    """A weight as in `cpu/params.h`.

    Attributes:
        weight: int8.
        start: int32 [K], or [16, K], where each channel's sum starts; K filled up to 16.
        transformed: Whether it is for Winograd's algorithm.
    """

    weight: Tensor
    start: Tensor
    transformed: bool


@dataclass
class Weights:
    """The arranged weights of all recordings of a session, by the address of the packed weight."""

    arranged: dict[tuple[int, bool], tuple[Tensor, Arranged]] = field(default_factory=dict)
    zeros: dict[int, Tensor] = field(default_factory=dict)

    def of(self, packed: Tensor, bounds: tuple[int, int] | None, vectors: int) -> Arranged:
        """The arranged weight of a packed one, uint8 [K, R * S, Cb] of 8-bit codes.

        Args:
            packed: The weight.
            bounds: Smallest and largest code of the input of a 3x3 convolution with stride 1; None for any other layer. Where Winograd's algorithm is exact
                for them, the weight is arranged for it.
            vectors: `edm_vectors()` of the compiled kernels.
        """
        narrow = bounds is not None and is_exact_input(*bounds)
        if (held := self.arranged.get((packed.data_ptr(), narrow))) is None:
            made = transformed(packed, vectors) if narrow else None
            # The packed weight is held too, so that no other takes its address.
            held = self.arranged[packed.data_ptr(), narrow] = (packed, made or arranged(packed, vectors))
        return held[1]

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of these weights, or of the codes outside a map."""
        own = (part for _, made in self.arranged.values() for part in (made.weight, made.start))
        return any(tensor is part for part in (*own, *self.zeros.values()))

    def zero(self, size: int) -> Tensor:
        """The codes of a pixel outside the map, int8 [size]."""
        return self.zeros.setdefault(size, torch.zeros(size, dtype=torch.int8))


def is_exact_input(low: int, high: int) -> bool:
    """Whether every sum of four codes in [low, high], or of two less two others, fits int8; 0, the code outside the map, among them."""
    low, high = min(low, 0), max(high, 0)
    return 4 * low >= -128 and 4 * high <= 127 and 2 * (high - low) <= 127


def arranged(packed: Tensor, vectors: int) -> Arranged:
    """For the direct convolution: groups of `vectors` * 16 output channels, of which the last may be smaller."""
    codes = _filled(packed)
    return Arranged(_in_groups(codes, vectors), -OFFSET * codes.sum(dim=(1, 2), dtype=torch.int32), transformed=False)


def transformed(packed: Tensor, vectors: int) -> Arranged | None:
    """For Winograd's algorithm; None where the transformed filters do not fit int8, or the layer is too small to gain."""
    codes = _filled(packed)
    outputs, _, channels = codes.shape
    if channels < LEAST_CHANNELS or outputs < LEAST_CHANNELS:
        return None
    places = torch.empty(outputs, 16, channels, dtype=torch.int8)
    for block in range(0, outputs, LANES):  # of a large weight only a part is wide at a time
        taps = codes[block : block + LANES].int().view(-1, 3, 3, channels)
        wide = torch.einsum("ir,krsc,js->kijc", FILTER, taps, FILTER)
        if int(wide.abs().max()) > 127:
            return None
        places[block : block + LANES] = wide.reshape(-1, 16, channels)
    return Arranged(_in_groups(places, vectors), (-OFFSET * places.sum(dim=2, dtype=torch.int32)).T.contiguous(), transformed=True)


def _filled(packed: Tensor) -> Tensor:
    """The codes int8 [K, R * S, Cb], K filled up to 16 with zeros."""
    return functional.pad(packed.view(torch.int8), (0, 0, 0, 0, 0, -packed.shape[0] % LANES))


def _in_groups(codes: Tensor, vectors: int) -> Tensor:
    _, taps, channels = codes.shape
    groups = [group.view(-1, taps, channels // 4, 4).permute(1, 2, 0, 3).flatten() for group in torch.split(codes, vectors * LANES)]
    return torch.cat(groups)
