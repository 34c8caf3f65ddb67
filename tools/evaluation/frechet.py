"""Frechet distance between two sets of feature vectors, each modelled as a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from edm_deploy.errors import InputError


def frechet_distance(actual: Tensor, expected: Tensor) -> float:
    """||m1 - m2||^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), 0 or more.

    The trace of the root is computed as that of (C1^(1/2) C2 C1^(1/2))^(1/2), whose argument is symmetric; the root of the product C1 C2 itself would have
    complex parts from rounding when samples are few. The covariances of n samples have rank n - 1 at most, and the distance of two sets of samples from
    one distribution is positive by about 1/n, so distances are comparable only at equal n.

    Args:
        actual: float [N, D].
        expected: float [M, D].

    Raises:
        InputError: Fewer than two vectors, or a value that is not finite.

    Source: Dowson and Landau, 1982; Heusel et al., arXiv 1706.08500.
    """
    for features in (actual, expected):
        if len(features) < 2:
            raise InputError(f"A Frechet distance needs at least 2 samples of each model, {len(features)} given. Increase --samples.")
        if not bool(features.isfinite().all()):
            raise InputError("Features of the samples are not finite: the quantized model diverges. Use more bits.")
    (mean_actual, covariance_actual), (mean_expected, covariance_expected) = moments(actual), moments(expected)
    root = symmetric_root(covariance_actual)
    product = root @ covariance_expected @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_actual - mean_expected).square().sum() + covariance_actual.trace() + covariance_expected.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, float64 [D] and [D, D]; the covariance is divided by N - 1."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def symmetric_root(matrix: Tensor) -> Tensor:
    """Square root of a symmetric positive semidefinite matrix, float64 [D, D]; eigenvalues below 0, from rounding, are set to 0."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
