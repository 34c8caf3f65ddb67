"""Wall time that a run may take, and how much of it is used: training by the clock instead of by a number of steps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from edm_deploy.errors import InputError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}  # seconds


class Budget:
    """A span of wall time, counted from when it is made.

    Args:
        seconds: How long, above 0.
        used: Seconds of it that are gone already: a resumed run's.
        clock: Seconds since some moment; tests have one of their own.
    """

    def __init__(self, seconds: float, *, used: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds, self._clock = seconds, clock
        self._start = clock() - used

    def used(self) -> float:
        """Seconds since it was made."""
        return self._clock() - self._start

    def share(self) -> float:
        """How much of it is used, 0 to 1."""
        return min(self.used() / self.seconds, 1.0) if self.seconds > 0 else 1.0

    def left(self) -> float:
        """Seconds, 0 or more."""
        return max(self.seconds - self.used(), 0.0)

    def part(self, share: float = 1.0) -> Budget:
        """A budget of its own, from now on: `share` of what is left. A loop over it sees its own share rise from 0 to 1."""
        return Budget(share * self.left(), clock=self._clock)

    def check_left(self, before: str) -> None:
        """Refuse to train where nothing is left to train in.

        Args:
            before: What took the time, as in `calibration`.

        Raises:
            InputError: The budget is used up; the message says what `before` took.
        """
        if self.share() >= 1:
            raise InputError(
                f"The budget of {self.seconds:.4g} s leaves no step to train: {before} alone took {self.used():.4g} s. "
                f"Set a --budget well above that, or lower rows or calibration_samples."
            )


def seconds_of(text: str) -> float:
    """Seconds of a duration as it is written on a command line: `30s`, `5m`, `1.5h`.

    Raises:
        InputError: It is none, or no longer than 0.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh])\s*", text)
    if match is None or not float(match[1]) > 0:
        raise InputError(f"Budget {text!r}: expected a duration above 0 such as 30s, 5m or 1h. Write number and unit.")
    return float(match[1]) * UNITS[match[2]]
