"""The counters of a loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from edm_deploy.serving.histogram import Histogram
from edm_deploy.serving.interface import Stats

Ending = Literal["finished", "cancelled", "failed"]


@dataclass(kw_only=True)
class Counters:
    """Fields as in `Stats`; changed under the loop's lock."""

    slots: int
    occupied: int = 0
    calls: int = 0
    rows: int = 0
    images: int = 0
    ended: dict[Ending, int] = field(default_factory=lambda: {"finished": 0, "cancelled": 0, "failed": 0})
    step: Histogram = field(default_factory=Histogram)
    engine: Histogram = field(default_factory=Histogram)
    queue: Histogram = field(default_factory=Histogram)
    request: Histogram = field(default_factory=Histogram)

    def add_call(self, rows: int, step_seconds: float, engine_seconds: float) -> None:
        """Count a call of the engine that computed `rows` rows."""
        self.calls += 1
        self.rows += rows
        self.occupied = rows
        self.step.add(step_seconds)
        self.engine.add(engine_seconds)

    def stats(self, *, requests: int, waiting: int, running: int, memory: int) -> Stats:
        """The counters as statistics, with the state of the queue."""
        return Stats(
            slots=self.slots,
            occupied=self.occupied if waiting + running else 0,
            requests=requests,
            waiting=waiting,
            running=running,
            memory=memory,
            calls=self.calls,
            rows=self.rows,
            images=self.images,
            finished=self.ended["finished"],
            cancelled=self.ended["cancelled"],
            failed=self.ended["failed"],
            step_seconds=self.step.counts(),
            engine_seconds=self.engine.counts(),
            queue_seconds=self.queue.counts(),
            request_seconds=self.request.counts(),
        )
