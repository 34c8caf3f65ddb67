"""Wall-time budget of a run: training for a given time instead of a given number of steps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from edm_deploy.errors import InputError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}  # seconds


class Budget:
    """A duration of wall time that starts on construction.

    Args:
        seconds: Duration, above 0.
        used: Seconds used before, by an interrupted run.
        clock: Monotonic clock in seconds; replaced in tests.
    """

    def __init__(self, seconds: float, *, used: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._clock = seconds, clock
        self._start = clock() - used

    def used(self) -> float:
        """Seconds used so far."""
        return self._clock() - self._start

    def share(self) -> float:
        """Share used so far, 0 to 1."""
        return min(self.used() / self.seconds, 1.0) if self.seconds > 0 else 1.0

    def left(self) -> float:
        """Seconds left, 0 or more."""
        return max(self.seconds - self.used(), 0.0)

    def part(self, share: float = 1.0) -> Budget:
        """A new budget that starts now: `share` of what is left."""
        return Budget(share * self.left(), clock=self._clock)

    def check_left(self, before: str) -> None:
        """Refuse to train if nothing is left.

        Args:
            before: What used the time, e.g. `calibration`.

        Raises:
            InputError: The budget is used up; the message states the time that `before` took.
        """
        if self.share() >= 1:
            raise InputError(
                f"The budget of {self.seconds:.4g} s leaves no step to train: {before} alone took {self.used():.4g} s. "
                f"Set a --budget well above that, or lower rows or calibration_samples."
            )


def seconds_of(text: str, *, name: str = "Budget") -> float:
    """Seconds of a duration as written on the command line: `30s`, `5m`, `1.5h`.

    Args:
        text: The duration.
        name: What it is the duration of, for the message.

    Raises:
        InputError: It is not a duration, or not above 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if match is None or not float(match[1]) > 0:
        raise InputError(f"{name} {text!r}: expected a duration above 0 such as 30s, 5m or 1h. Write a number and a unit.")
    return float(match[1]) * UNITS[match[2]]
