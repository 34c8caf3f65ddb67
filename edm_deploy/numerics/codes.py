"""Integer codes: bounds, rounding and packing. Code 0 is always real 0: an asymmetric range is a pair of bounds, not a zero-point."""

from __future__ import annotations

import torch
from torch import Tensor

from edm_deploy.errors import InputError

WEIGHT_ONLY_BITS = 16  # activation bits of a site whose input is not quantized

WEIGHT_BITS = range(2, 9)
ACTIVATION_BITS = range(3, 9)


def weight_bounds(bits: int) -> tuple[int, int]:
    """Smallest and largest weight code at `bits` bits.

    Two's complement for 2 to 7 bits; [-127, 127] at 8, so that codes can be negated and no engine computes -128 x -128.

    Raises:
        InputError: `bits` is not in 2..8.
    """
    if bits not in WEIGHT_BITS:
        raise InputError(f"weight bits {bits}: expected {WEIGHT_BITS.start} to {WEIGHT_BITS.stop - 1}.")
    if bits == 8:
        return -127, 127
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def symmetric_bounds(bits: int) -> tuple[int, int]:
    """Smallest and largest activation code of a symmetric range at `bits` bits: [-(2^(b-1) - 1), 2^(b-1) - 1].

    Raises:
        InputError: `bits` is not in 3..8.
    """
    check_activation_bits(bits)
    return -(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1


def check_activation_bits(bits: int) -> None:
    """Check the number of activation bits.

    Raises:
        InputError: `bits` is not in 3..8.
    """
    if bits not in ACTIVATION_BITS:
        raise InputError(f"activation bits {bits}: expected {ACTIVATION_BITS.start} to {ACTIVATION_BITS.stop - 1}.")


def per_channel(values: Tensor, like: Tensor) -> Tensor:
    """`values` [C] reshaped to [C, 1, ...], which broadcasts along the first axis of `like`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))


def channel_bounds(bits: Tensor) -> tuple[Tensor, Tensor]:
    """`weight_bounds` of each output channel, float32 [C] each, for `bits` of any integer dtype, [C]."""
    bounds = torch.tensor([weight_bounds(int(channel)) for channel in bits.tolist()], dtype=torch.float32, device=bits.device)
    return bounds[:, 0], bounds[:, 1]


def quantize_weight(weight: Tensor, scale: Tensor, bits: int | Tensor) -> Tensor:
    """Quantize a weight: `clip(round(W / s_w[o]), qmin, qmax)`, rounded half to even.

    Args:
        weight: float32 [Cout, ...].
        scale: float32 [Cout], each > 0.
        bits: 2 to 8: one number, or one per output channel, integers [Cout].

    Returns:
        Codes, int8 in the shape of `weight`.
    """
    codes = (weight / per_channel(scale, weight)).round_()
    if isinstance(bits, int):
        return codes.clamp_(*weight_bounds(bits)).to(torch.int8)
    qmin, qmax = (per_channel(bound, weight) for bound in channel_bounds(bits))
    return codes.clamp_(qmin, qmax).to(torch.int8)


def dequantize_weight(codes: Tensor, scale: Tensor) -> Tensor:
    """`codes * s_w[o]`, float32 in the shape of `codes` (int8 [Cout, ...]), for `scale` float32 [Cout]."""
    return codes.to(scale.dtype) * per_channel(scale, codes)


def pack_int4(codes: Tensor) -> Tensor:
    """Pack signed 4-bit codes two to a byte, in the byte order of ONNX INT4.

    Args:
        codes: int8 [...], each in [-8, 7]. Read row-major: element 2k is the low nibble of byte k.

    Returns:
        uint8 [ceil(codes.numel() / 2)]; an odd tail is padded with a zero high nibble.

    Raises:
        ValueError: A code does not fit in 4 bits.
    """
    if codes.numel() and (int(codes.min()) < -8 or int(codes.max()) > 7):
        raise ValueError(f"codes in [{int(codes.min())}, {int(codes.max())}] do not fit INT4's [-8, 7].")
    flat = codes.reshape(-1).to(torch.uint8)
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[0::2] & 0xF) | ((flat[1::2] & 0xF) << 4)


def unpack_int4(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_int4`.

    Args:
        packed: uint8 [ceil(prod(shape) / 2)].
        shape: Shape of the codes.

    Returns:
        int8 [*shape], each in [-8, 7].

    Raises:
        ValueError: The length of `packed` does not match `shape`.
    """
    count = int(torch.Size(shape).numel())
    if packed.numel() != (count + 1) // 2:
        raise ValueError(f"{packed.numel()} bytes hold {2 * packed.numel()} codes; shape {shape} needs {count}.")
    signed = packed.reshape(-1).view(torch.int8)
    low, high = (signed << 4) >> 4, signed >> 4  # arithmetic shifts extend the sign
    return torch.stack([low, high], dim=1).reshape(-1)[:count].reshape(shape)


def fits_int4(codes: Tensor) -> bool:
    """Whether every code is in [-8, 7]."""
    if codes.numel() == 0:
        return True
    lowest, highest = torch.aminmax(codes)
    return int(lowest) >= -8 and int(highest) <= 7
