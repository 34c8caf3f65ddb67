"""Memory layout of codes and tables for the kernels, as described in `engines/kernels/cuda/params.h`. Works on any device."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import fits_int4

# Operand types of integer tensor cores (activation by weight): signed by signed 4 bits, unsigned by signed 4 bits, signed by signed 8 bits.
CodeFormat = Literal["s4", "u4", "s8"]
SPAN4 = 15  # largest qmax - qmin that an unsigned 4-bit code n - qmin can represent
CODE_FORMATS: tuple[CodeFormat, ...] = get_args(CodeFormat)

CHUNK = 16  # bytes that one cp.async copies; every pixel and every filter tap is aligned to it


def bits_of(kind: str) -> int:
    """Number of bits that format `kind` stores an activation or weight code in: 4 or 8.

    Raises:
        InputError: `kind` is not one of CODE_FORMATS.
    """
    if kind not in CODE_FORMATS:
        raise InputError(f"No kernel kind {kind!r}; expected {', '.join(CODE_FORMATS)}.")
    return 8 if kind == "s8" else 4


def code_bytes(channels: int, bits: int) -> int:
    """Size in bytes of the codes of one pixel or one filter tap (Cb): `channels` codes of 4 or 8 bits, rounded up to whole chunks of 16 bytes.

    Raises:
        InputError: `bits` is neither 4 nor 8.
    """
    if bits not in (4, 8):
        raise InputError(f"codes of {bits} bits: expected 4 or 8, the two widths that the kernels store.")
    return -(-channels * bits // (8 * CHUNK)) * CHUNK


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis, padded with zeros to whole chunks.

    Args:
        codes: integers [..., C]: in [-8, 15] at 4 bits (signed and unsigned nibbles alike), in [-128, 127] at 8.
        bits: 4 or 8.

    Returns:
        uint8 [..., code_bytes(C, bits)], contiguous. At 4 bits, channel 2k is the low nibble of byte k.

    Raises:
        InputError: `bits` is neither 4 nor 8.
    """
    channels = codes.shape[-1]
    stored = code_bytes(channels, bits) * 8 // bits
    padded = functional.pad(codes.to(torch.int8), (0, stored - channels)).view(torch.uint8)
    if bits == 8:
        return padded.contiguous()
    return ((padded[..., 0::2] & 0xF) | (padded[..., 1::2] << 4)).contiguous()  # `codes` may be a transposed view


def unpack_codes(packed: Tensor, bits: int, *, unsigned: bool = False, channels: int | None = None) -> Tensor:
    """Undo `pack_codes`.

    Args:
        packed: uint8 [..., Cb].
        bits: 4 or 8.
        unsigned: Whether nibbles are in [0, 15] rather than [-8, 7].
        channels: Number of codes per pixel to return; None includes the padding.

    Returns:
        int8 [..., channels].
    """
    if bits == 8:
        return packed.view(torch.int8)[..., :channels]
    nibbles = torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2).view(torch.int8)
    return (nibbles if unsigned else nibbles - ((nibbles & 8) << 1))[..., :channels]


def pack_weight(codes: Tensor, bits: int) -> Tensor:
    """Pack a weight as the convolution reads it: channels last, one row of chunks per filter tap.

    Args:
        codes: int8 [K, C, R, S], or [K, C] of a Linear; at 4 bits each in [-8, 7].
        bits: 4 or 8. Codes that fit 4 bits may be stored in 8, so that the site runs as `s8`.

    Returns:
        uint8 [K, R * S, Cb], contiguous; padding channels hold 0.

    Raises:
        InputError: Codes do not fit in `bits`, or have another number of dimensions.
    """
    if codes.ndim not in (2, 4):
        raise InputError(f"weight codes have shape {list(codes.shape)}; expected [K, C, R, S] or [K, C].")
    if bits == 4 and not fits_int4(codes):
        raise InputError(f"weight codes in [{int(codes.min())}, {int(codes.max())}] do not fit 4 bits' [-8, 7]; pack them with 8.")
    taps = codes.flatten(2) if codes.ndim == 4 else codes[..., None]
    return pack_codes(taps.transpose(1, 2), bits)


def weight_sum(codes: Tensor) -> Tensor:
    """Sum of each output channel's codes, int32 [K], by which a `u4` kernel converts the sum of (n - qmin) * w to that of n * w.

    Args:
        codes: int8 [K, ...].
    """
    return codes.flatten(1).sum(dim=1, dtype=torch.int32)


def zero_codes(qmin: Tensor, bits: int, *, unsigned: bool) -> Tensor:
    """One chunk of the code of real 0 at every table row, which the kernel reads where a filter extends beyond the feature map.

    Args:
        qmin: integers [rows], each <= 0.
        bits: 4 or 8.
        unsigned: Whether codes are stored as `n - qmin`, so that real 0 is -qmin; otherwise it is 0.

    Returns:
        uint8 [rows, 16].

    Raises:
        InputError: Unsigned codes of 8 bits, or a -qmin above 15.
    """
    if unsigned:
        check_unsigned(bits)
        if int(qmin.min()) < -SPAN4:
            raise InputError(f"qmin {int(qmin.min())}: an unsigned 4-bit code cannot represent real 0 below {-SPAN4}. Use kind s8.")
    zero = -qmin if unsigned else torch.zeros_like(qmin)
    per_chunk = CHUNK * 8 // bits
    return pack_codes(zero[:, None].expand(-1, per_chunk), bits)


def check_unsigned(bits: int) -> None:
    """Check that unsigned codes have 4 bits; 8-bit codes always fit int8.

    Raises:
        InputError: `bits` is not 4.
    """
    if bits != 4:
        raise InputError(f"unsigned codes of {bits} bits: expected 4. Codes of 8 bits are stored signed.")
