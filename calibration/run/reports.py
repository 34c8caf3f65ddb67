"""What a training reports while it runs, besides its progress: values by step, and samples of student and teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor

PREVIEWS = 10  # sets of samples in a training

Network = Callable[[Mapping[str, Tensor]], Tensor]


class Report(Protocol):
    """Receives what a training reports; in processes that do not write, it does nothing."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Values after `step` steps, by name."""

    def samples(self, step: int, student: Tensor, teacher: Tensor) -> None:
        """Final samples after `step` steps, float32 [N, ...] each, from the same noise."""


class Reporter:
    """Calls a report after each step, and at every tenth of the training with samples.

    Args:
        report: None reports nothing.
        sample: Final samples of a network from fixed noise.
        student: The network that is trained.
        teacher: The float network; it is sampled once.
        steps: Expected number of steps.
    """

    def __init__(
        self, report: Report | None, sample: Callable[[Network], Tensor] | None, student: Network, teacher: Network, steps: int
    ) -> None:
        self._report, self._sample, self._student, self._teacher = report, sample, student, teacher
        self._every = max(1, steps // PREVIEWS)
        self._expected: Tensor | None = None

    def after(self, step: int, values: Mapping[str, float], *, finished: bool) -> None:
        """Report the values of a step, and samples where they are due."""
        if self._report is None:
            return
        self._report.scalars(step, values)
        if self._sample is not None and (finished or step % self._every == 0):
            if self._expected is None:
                self._expected = self._sample(self._teacher)
            self._report.samples(step, self._sample(self._student), self._expected)
