"""GPTQ: weights rounded one input at a time, each error compensated by the inputs that are not rounded yet.

Source: Frantar et al., GPTQ, ICLR 2023, arXiv 2210.17323, algorithm 1; order of inputs and damping as in the released code,
github.com/IST-DASLab/gptq (`--act-order`, `percdamp`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from edm_deploy.numerics.codes import weight_bounds

BLOCK = 128


def gptq(weight: Tensor, scale: Tensor, bits: int, moments: Tensor, *, damping: float = 0.01) -> Tensor:
    """Codes of a weight that minimize the layer's output error, `tr(E H E^T)` of the error E, greedily.

    Args:
        weight: float32 [Cout, N].
        scale: float32 [Cout], each > 0; it is not changed.
        bits: 2 to 8.
        moments: float32 [N, N], H: the mean of `x x^T` over the layer's inputs.
        damping: Share of the mean diagonal that is added to the diagonal of H. Source: 0.01.

    Returns:
        int8 [Cout, N].
    """
    lowest, highest = weight_bounds(bits)
    power = moments.diagonal()
    order = power.argsort(descending=True, stable=True)  # the inputs that matter most first
    damped = moments[order][:, order].clone()
    damped.diagonal().add_(damping * power.mean() + torch.finfo(torch.float32).tiny)
    inverse = _upper_inverse(damped)
    left = weight[:, order].clone()
    codes = torch.empty_like(left)
    for start in range(0, left.shape[1], BLOCK):
        block = left[:, start : start + BLOCK]
        factor = inverse[start : start + BLOCK, start : start + BLOCK]
        errors = torch.empty_like(block)
        for index in range(block.shape[1]):
            column = block[:, index]
            codes[:, start + index] = (column / scale).round().clamp(lowest, highest)
            errors[:, index] = (column - codes[:, start + index] * scale) / factor[index, index]
            block[:, index + 1 :].addr_(errors[:, index], factor[index, index + 1 :], alpha=-1)
        left[:, start + BLOCK :].addmm_(errors, inverse[start : start + BLOCK, start + BLOCK :], alpha=-1)
    return torch.empty_like(codes).index_copy_(1, order, codes).to(torch.int8)


def _upper_inverse(moments: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse of H, float32 [N, N]. H is damped further where it is not positive in float32."""
    for _ in range(10):
        lower, failed = torch.linalg.cholesky_ex(moments)
        if not int(failed):
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not int(failed):
                return upper
        moments = moments.clone()
        moments.diagonal().mul_(1.1).add_(moments.diagonal().mean() * 0.1)
    return torch.eye(len(moments), device=moments.device)  # nothing is known about the inputs: nearest rounding
