"""Counts of durations by bucket, which are added over replicas and read by Prometheus."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)  # seconds, inclusive


@dataclass(frozen=True)
class Counts:
    """How many durations fell into each bucket.

    Attributes:
        buckets: Durations up to each of BOUNDS and above the one before; the last are those above all.
        total: Sum of the durations, in seconds.
    """

    buckets: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    total: float = 0.0

    @property
    def count(self) -> int:
        """Number of durations."""
        return sum(self.buckets)

    @property
    def mean(self) -> float:
        """Mean duration in seconds; 0 where there is none."""
        return self.total / max(self.count, 1)

    def __add__(self, other: Counts) -> Counts:
        return Counts(tuple(one + more for one, more in zip(self.buckets, other.buckets, strict=True)), self.total + other.total)


class Histogram:
    """Counts to which durations are added; one thread adds."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(BOUNDS) + 1)
        self._total = 0.0

    def add(self, seconds: float) -> None:
        """Count one duration."""
        self._buckets[bisect_left(BOUNDS, seconds)] += 1
        self._total += seconds

    def counts(self) -> Counts:
        """The counts so far."""
        return Counts(tuple(self._buckets), self._total)
