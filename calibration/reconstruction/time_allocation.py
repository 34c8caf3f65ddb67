"""How long each block trains: by a number of steps, or by the clock, which is divided over the blocks by their work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibration.run.time_budget import Budget


def training_steps(steps: int, budget: Budget | None) -> Iterator[tuple[float, float]]:
    """For each step how much of the training is over, 0 to 1, and how much of it the step is.

    Args:
        steps: Their number, where no budget decides.
        budget: Steps go on until it is used up; a step is as much as the one before it took, the first is nothing.
    """
    if budget is None:
        yield from ((step / steps, 1 / steps) for step in range(steps))
        return
    before = now = budget.share()
    while now < 1:
        yield now, now - before
        before, now = now, budget.share()


class TimeAllocation:
    """How training is divided over the blocks: multiply-accumulates times steps. Filling the caches takes time beside, which is learned as it is seen.

    Tasks are numbered stage by stage, block by block.

    Args:
        macs: Multiply-accumulates of each block, in the order in which they run.
        steps: A block's training steps in each stage.
    """

    def __init__(self, macs: Sequence[int], steps: Sequence[int]) -> None:
        self.work = [float(max(block, 1)) * count for count in steps for block in macs]
        # A cache is filled by running the network up to the block.
        self.filling = [float(sum(macs[: index + 1])) for _ in steps for index in range(len(macs))]
        self.filled, self.seconds = 0.0, 0.0

    def cached(self, number: int, seconds: float) -> None:
        """Filling the cache of this task took so long."""
        self.filled, self.seconds = self.filled + self.filling[number], self.seconds + seconds

    def passes(self, number: int) -> float:
        """Forward passes of one sample that filling its caches from this task on amounts to."""
        return sum(self.filling[number:]) / max(self.filling[-1], 1.0)

    def part(self, number: int, left: float) -> float:
        """The share, 0 to 1, of the seconds that are `left` that this task may train; caches that are still to be filled are set aside."""
        to_fill = self.seconds / max(self.filled, 1.0) * sum(self.filling[number + 1 :])
        return self.work[number] / sum(self.work[number:]) * max(0.0, 1 - to_fill / max(left, 1e-9))

    def done(self, number: int, share: float) -> float:
        """How much of all training is done, 0 to 1, when `share` of this task is."""
        return (sum(self.work[:number]) + share * self.work[number]) / sum(self.work)
