"""Attention in plain torch as `cuda/params.h` specifies it: the codes and the sums of their products exactly, powers and their sums in float32.

For tests of everything above the kernels on a machine without a GPU. It is slow.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engines.kernels.attention.operands import LARGEST_CODE, LEAST_MAGNITUDE, AttentionOperands


def attention(operands: AttentionOperands) -> Tensor:
    """softmax(Q K^T * scale) V with 8-bit queries and keys, [B, H, Lq, D] in the operands' type, a view of [B, Lq, H, D].

    A GPU's result differs in the last bits of powers and sums, and in a code of a key whose value is at a rounding tie: there the mean is summed in float32.
    A weight of less than 2^-14 of the largest is rounded to a multiple of 2^-24 of it in float16, here of the largest of all, there of the largest so far.
    """
    query, key, value = operands.query, operands.key, operands.value
    batch, heads, length, width = query.shape
    out = torch.empty((batch, length, heads, width), dtype=query.dtype, device=query.device)
    query_codes, query_scale = head_codes(query.float())
    key_codes, key_scale = head_codes(smoothed(key))
    factor = torch.tensor(operands.factor, dtype=torch.float32)
    for place in [(sample, head) for sample in range(batch) for head in range(heads)]:  # the scores of one head at a time
        # Products of codes and their sums stay below 2^24, so that float32 is exact.
        scores = (query_codes[place] @ key_codes[place].T) * key_scale[place]
        powers = powers_of(scores, query_scale[place][:, None] * factor)
        weighted = powers.to(query.dtype).float() @ value[place].float()
        out[place[0], :, place[1]] = (weighted * (1 / powers.sum(-1, keepdim=True))).to(query.dtype)
    return out.transpose(1, 2)


def smoothed(key: Tensor) -> Tensor:
    """Keys [B, H, L, D] less their mean over tokens, float32. The mean is summed in float64.

    It adds the same number to all scores of a query, which softmax does not see. Source: SageAttention, arXiv 2410.02367, section 4.2.
    """
    return key.float() - key.double().mean(2, keepdim=True).float()


def head_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of float32 [..., D] in [-127, 127], as float32, and the scale of each token, float32 [...]. NaN becomes -127."""
    largest = x.abs().nan_to_num(nan=0.0, posinf=float("inf")).amax(-1).clamp(min=LEAST_MAGNITUDE)
    scaled = x * (LARGEST_CODE / largest)[..., None]
    limit = torch.tensor(LARGEST_CODE)
    return torch.fmin(torch.fmax(scaled, -limit), limit).round(), largest / LARGEST_CODE


def powers_of(scores: Tensor, factor: Tensor) -> Tensor:
    """2^(scores * factor), relative to the largest of each row, float32; one rounding of the exponent, as of a fused multiply-add."""
    shift = scores.amax(-1, keepdim=True) * factor
    return (scores.double() * factor.double() - shift.double()).float().exp2()
