"""Clustering: deterministic k-means, and the optimal partition of a sequence into contiguous segments."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ITERATIONS = 100  # of k-means, which converges after a few


def cluster(points: Tensor, count: int) -> Tensor:
    """k-means initialized with the optimal contiguous segments: deterministic, and the result is never worse than those.

    Args:
        points: float [N, F], ordered so that neighbours are similar.
        count: Number of clusters.

    Returns:
        int64 [N], cluster of each point; numbered from 0 in the order of first occurrence, at most `count`.
    """
    groups = segment(points, count)
    for _ in range(MAX_ITERATIONS):
        nearest = torch.cdist(points.double(), centroids_of(points, groups).double()).argmin(1)
        if torch.equal(nearest, groups):
            break
        groups = _renumbered(nearest)
    return groups


def segment(points: Tensor, count: int) -> Tensor:
    """The partition of a sequence into `count` contiguous segments with the least squared distance to their means; exact, by dynamic programming.

    Args:
        points: float [N, F].
        count: Number of segments; limited to the number of points.

    Returns:
        int64 [N], ascending from 0.

    Source: Fisher, On Grouping for Maximum Homogeneity, JASA 53, 1958.
    """
    total, count = len(points), min(count, len(points))
    cost = _costs(points.double())
    best = cost[0].clone()  # best[i]: cost of points 0..i in the current number of segments
    cuts = torch.zeros(count, total, dtype=torch.int64)
    for group in range(1, count):
        # The last segment is start..i; the points before it form one segment less.
        before = torch.cat([best.new_full((1,), torch.inf), best[:-1]])
        options = before[:, None] + cost
        best, cuts[group] = options.min(0)
    groups, end = torch.zeros(total, dtype=torch.int64), total
    for group in range(count - 1, 0, -1):
        start = int(cuts[group, end - 1])
        groups[start:end] = group
        end = start
    return groups


def centroids_of(points: Tensor, groups: Tensor) -> Tensor:
    """Mean of each cluster, float [G, F]; every number from 0 to the largest must occur."""
    return torch.stack([points[groups == group].mean(0) for group in range(int(groups.max()) + 1)])


def memberships(points: Tensor, groups: Tensor) -> Tensor:
    """Membership of each point in each cluster, float [N, G], each row sums to 1: Gaussians around the means, with the variance of the clusters."""
    centres = centroids_of(points, groups)
    apart = torch.cdist(points, centres).square()
    width = apart.gather(1, groups[:, None]).mean().clamp(min=torch.finfo(apart.dtype).tiny)
    return (-apart / (2 * width)).softmax(1)


def _costs(points: Tensor) -> Tensor:
    """Squared distance of points start..end to their mean, float64 [start, end]; infinite if end is before start."""
    count = len(points)
    sums = torch.cat([points.new_zeros(1, points.shape[1]), points.cumsum(0)])
    squares = torch.cat([points.new_zeros(1), points.square().sum(1).cumsum(0)])
    cost = points.new_full((count, count), torch.inf)
    for start in range(count):
        length = torch.arange(1, count - start + 1)
        means = (sums[start + 1 :] - sums[start]).square().sum(1) / length
        cost[start, start:] = (squares[start + 1 :] - squares[start] - means).clamp(min=0)
    return cost


def _renumbered(groups: Tensor) -> Tensor:
    """Clusters numbered in the order of first occurrence, without gaps."""
    numbers: dict[int, int] = {}
    return torch.tensor([numbers.setdefault(int(group), len(numbers)) for group in groups])
