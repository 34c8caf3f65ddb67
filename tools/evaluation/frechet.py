"""The Frechet distance between two sets of feature vectors, each taken for a sample of a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from edm_deploy.errors import InputError


def frechet_distance(found: Tensor, expected: Tensor) -> float:
    """||m1 - m2||^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more.

    The trace of the root is that of (C1^(1/2) C2 C1^(1/2))^(1/2), whose argument is symmetric: no root of a matrix that is not, which with few samples has
    complex parts of rounding alone. Of n samples the covariances have at most rank n - 1, and the distance of two samples of one distribution is above 0
    by about 1/n: distances are comparable at one n only.

    Args:
        found: float [N, D].
        expected: float [M, D].

    Raises:
        InputError: Fewer than two vectors, or a value that is not finite.

    Source: Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500.
    """
    for features in (found, expected):
        if len(features) < 2:
            raise InputError(f"A Frechet distance needs at least 2 samples of each model, {len(features)} given. Set a larger --samples.")
        if not bool(features.isfinite().all()):
            raise InputError("A sample has features that are not finite: the quantized model diverges. Use more bits.")
    (mean_found, covariance_found), (mean_expected, covariance_expected) = moments(found), moments(expected)
    root = symmetric_root(covariance_found)
    product = root @ covariance_expected @ root
    of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_found - mean_expected).square().sum() + covariance_found.trace() + covariance_expected.trace() - 2 * of_root
    return max(float(distance), 0.0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """float64 [D] and [D, D]: mean, and covariance with N - 1 in its denominator."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def symmetric_root(matrix: Tensor) -> Tensor:
    """The root of a symmetric positive semidefinite matrix, float64 [D, D]; eigenvalues that rounding has brought below 0 are taken for 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T
