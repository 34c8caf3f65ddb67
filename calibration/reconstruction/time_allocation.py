"""Training time of each block: a number of steps, or a share of a wall-time budget in proportion to the block's work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from calibration.run.time_budget import Budget


def training_steps(steps: int, budget: Budget | None) -> Iterator[tuple[float, float]]:
    """For each step the share of the training done before it, 0 to 1, and the share that the step itself is.

    Args:
        steps: Number of steps, if there is no budget.
        budget: Steps continue until it is used up; the share of a step is estimated by the time of the previous one, and is 0 for the first.
    """
    if budget is None:
        yield from ((step / steps, 1 / steps) for step in range(steps))
        return
    before = now = budget.share()
    while now < 1:
        yield now, now - before
        before, now = now, budget.share()


class TimeAllocation:
    """Division of the training time over the blocks: multiply-accumulates times steps. The time for filling the caches is measured during the run.

    Tasks are numbered stage by stage, block by block.

    Args:
        macs: Multiply-accumulates of each block, in execution order.
        steps: Training steps per block in each stage.
    """

    def __init__(self, macs: Sequence[int], steps: Sequence[int]) -> None:
        self.work = [float(max(block, 1)) * count for count in steps for block in macs]
        # Filling a cache runs the network up to the end of the block.
        self.filling = [float(sum(macs[: index + 1])) for _ in steps for index in range(len(macs))]
        self.filled_work, self.filled_seconds = 0.0, 0.0

    def record_cache(self, task: int, seconds: float) -> None:
        """Record the time that filling the cache of this task took."""
        self.filled_work, self.filled_seconds = self.filled_work + self.filling[task], self.filled_seconds + seconds

    def forward_passes(self, task: int) -> float:
        """Forward passes per sample for filling the caches of this and all later tasks."""
        return sum(self.filling[task:]) / max(self.filling[-1], 1.0)

    def task_share(self, task: int, left: float) -> float:
        """Share, 0 to 1, of the `left` seconds that this task may train, after reserving the time for caches that are still to be filled."""
        to_fill = self.filled_seconds / max(self.filled_work, 1.0) * sum(self.filling[task + 1 :])
        return self.work[task] / sum(self.work[task:]) * max(0.0, 1 - to_fill / max(left, 1e-9))

    def done(self, task: int, share: float) -> float:
        """Share of all training that is done, 0 to 1, when `share` of this task is done."""
        return (sum(self.work[:task]) + share * self.work[task]) / sum(self.work)
