"""Block Hadamard rotation of a linear layer's input, which spreads the outliers of a few channels over a block of channels.

`W x = (W H^-1) (H x)` for any invertible H. H is block diagonal with one regular Hadamard matrix for all blocks: each channel of H x is a sum of all channels of
its block with signs, and the sums of its rows are equal, so that a mean which all channels share does not gather in one channel.

Sources: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4 (rotations computed online, in front of a linear layer); ConvRot, arXiv 2512.03673 (regular Hadamard
matrices, rotations of groups of channels). Deviation: entries are powers of two, so that float16 and bfloat16 hold them exactly; where the size of a block is an odd
power of two, H is therefore orthogonal up to the factor 1 / sqrt(2), which the weight compensates exactly.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

USUAL_BLOCK = 256  # at most, unless another size is set. Source: ConvRot's group size, which ComfyUI's checkpoints have too
MAX_BLOCK = 1024  # a matrix is kept in memory
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_CPU = torch.device("cpu")


def hadamard(block: int, dtype: torch.dtype = torch.float32, device: torch.device = _CPU) -> Tensor:
    """The matrix H of one block: symmetric, `H @ H = I / gain(block)`, every entry plus or minus one power of two.

    Args:
        block: Its size, a power of two.
        dtype: Each of DTYPES represents the entries exactly.
        device: Where the matrix is kept.

    Returns:
        [block, block], which later calls return too.
    """
    return _hadamard(block, dtype, device)


@functools.cache
def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    if (dtype, device) != (torch.float32, _CPU):
        return hadamard(block).to(device, dtype)
    log = block.bit_length() - 1
    matrix = torch.ones(1, 1, device=device)
    for _ in range(log // 2):
        matrix = torch.kron(matrix, 1 - 2 * torch.eye(4, device=device).flip(0))  # the regular matrix of size 4
    if log % 2:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device))
    return matrix * 2.0 ** -((log + 1) // 2)


def gain(block: int) -> int:
    """The factor of H's inverse: 1 where `block` is a power of four, 2 otherwise."""
    return 2 if block.bit_length() % 2 == 0 else 1


def rotate(x: Tensor, block: int) -> Tensor:
    """`H x` along the last axis, in the dtype of `x` [..., C]; `block` divides C."""
    matrix = hadamard(block, x.dtype, x.device)
    if x.shape[-1] == block:
        return x @ matrix
    blocks: Tensor = x.unflatten(-1, (-1, block))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return (blocks @ matrix).flatten(-2)


def rotate_weight(weight: Tensor, block: int) -> Tensor:
    """`W H^-1`, float32 [Cout, Cin], of the weight [Cout, Cin] of a layer whose input is rotated. `rotate` undoes it."""
    return rotate(weight.float(), block) * gain(block)


def largest_block(channels: int, most: int = USUAL_BLOCK) -> int:
    """The largest power of two that divides a number of channels, at most `most`, which is a power of two."""
    return min(channels & -channels, most)


def is_block(size: int) -> bool:
    """Whether a number is the size of a block: a power of two, 2 to MAX_BLOCK."""
    return 2 <= size <= MAX_BLOCK and not size & (size - 1)


def prepare(block: int) -> None:
    """Compute the matrix of a block now: a tracer that meets it for the first time would keep one without values."""
    for dtype in DTYPES:
        hadamard(block, dtype)


def problem_of(layer: nn.Module, block: int) -> str | None:
    """The reason why the input of a layer cannot be rotated in blocks of this size, as a phrase, or None."""
    if not isinstance(layer, nn.Linear):
        return "it is a convolution, expected a linear layer"
    if not is_block(block):
        return f"expected a power of two, 2 to {MAX_BLOCK}"
    if layer.in_features % block:
        return f"it has {layer.in_features} input channels, expected a size that divides them, such as {largest_block(layer.in_features)}"
    return None
