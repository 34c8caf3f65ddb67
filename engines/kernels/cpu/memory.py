"""Memory of a recorded graph: blocks that tensors with disjoint lifetimes share, kept as long as the recording."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

ALIGNMENT = 64


def storage_of(tensor: Tensor) -> int:
    """The address of a tensor's storage: views of one tensor share it."""
    return tensor.untyped_storage().data_ptr()


class Memory:
    """Allocates tensors from blocks. A block whose tensor is no longer read serves a later one; none is returned before the recording ends.

    Attributes:
        bounds: Smallest and largest code that a tensor can hold, by its address, where that is known; forgotten with the tensor.
    """

    def __init__(self) -> None:
        self.bounds: dict[int, tuple[int, int]] = {}
        self._blocks: dict[int, Tensor] = {}  # uint8, by address
        self._free: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Tensor:
        """A tensor of undefined content, contiguous or with these strides, which must be dense; aligned to ALIGNMENT bytes."""
        size = max(1, math.prod(shape)) * dtype.itemsize
        block = self._block(-(-size // ALIGNMENT) * ALIGNMENT)
        self.bounds.pop(block.data_ptr(), None)
        flat = block[:size].view(dtype)
        return flat[: math.prod(shape)].view(*shape) if strides is None else flat.as_strided(tuple(shape), tuple(strides))

    def owns(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in one of the blocks."""
        return storage_of(tensor) in self._blocks

    def free(self, storage: int) -> None:
        """Let the block with this address serve the next tensor."""
        self._free.append(self._blocks[storage])

    @property
    def total(self) -> int:
        """Bytes of all blocks."""
        return sum(block.numel() for block in self._blocks.values())

    def _block(self, size: int) -> Tensor:
        fitting = [place for place, block in enumerate(self._free) if size <= block.numel() <= 2 * size]
        if fitting:
            # The one freed last: its memory is likelier to be in the cache.
            return self._free.pop(fitting[-1])
        block = torch.empty(size, dtype=torch.uint8)
        assert block.data_ptr() % ALIGNMENT == 0  # torch aligns its memory on CPUs so
        self._blocks[storage_of(block)] = block
        return block
