"""The low-rank part of a weight."""

from __future__ import annotations

import torch
from torch import Tensor


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product `up @ down` of a rank to a matrix, by its leading singular vectors (Eckart and Young, 1936).

    Each singular value is shared equally, so that both factors are of similar size.

    Args:
        weight: float32 [Cout, N].
        rank: At most min(Cout, N).

    Returns:
        down, float32 [rank, N], and up, float32 [Cout, rank].
    """
    # From the Gram matrix of the smaller side, in float64: ten times as fast as a singular value decomposition, which computes all vectors.
    wide = weight.shape[0] <= weight.shape[1]
    rows = weight.double() if wide else weight.T.double()
    power, vectors = torch.linalg.eigh(rows @ rows.T)
    left = vectors[:, -rank:].flip(1)
    root = power[-rank:].flip(0).clamp(min=0).sqrt().sqrt()  # of a singular value
    share = torch.where(root > 0, 1 / root, 0.0)
    outer, inner = (left * root).float(), (share[:, None] * (left.T @ rows)).float()
    return (inner, outer) if wide else (outer.T.contiguous(), inner.T.contiguous())


def rough_low_rank(weight: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Nearly the product of `low_rank`, at a fraction of its time: float32 [Cout, N]; 0 for rank 0.

    Source: Halko, Martinsson and Tropp, Finding structure with randomness, arXiv 0909.4061, algorithm 4.4 with two iterations.
    """
    if not rank:
        return torch.zeros_like(weight)
    basis = torch.randn(weight.shape[1], rank, generator=generator).to(weight.device)
    for _ in range(2):
        basis = torch.linalg.qr(weight.T @ (weight @ basis)).Q
    left: Tensor = torch.linalg.qr(weight @ basis).Q
    return left @ (left.T @ weight)
