"""Progress of one stage of a run: rate, remaining time, peak memory, and interruption by the user."""

from __future__ import annotations

import time
from types import TracebackType

import torch

from calibration.run.interrupt_flag import InterruptFlag
from calibration.run.memory import peak_memory
from calibration.run.options import Interrupted, Progress, Run
from calibration.run.processes import ProcessLostError


class ProgressMeter:
    """Context manager around the loop of a stage: reports each step, and records SIGINT and SIGTERM so that the loop can end after a step.

    Args:
        run: Receives the progress.
        stage: As `Progress.stage`.
        device: Device whose peak memory is reported.
        first_step: Steps done before this process resumed the run.
    """

    def __init__(self, run: Run, stage: str, device: torch.device, *, first_step: int = 0) -> None:
        self._run, self._stage, self._device, self._first_step = run, stage, device, first_step
        self._interrupt = InterruptFlag()
        self._start = time.perf_counter()

    def __enter__(self) -> ProgressMeter:
        self._interrupt.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._interrupt.__exit__(kind, error, trace)

    @property
    def interrupted(self) -> bool:
        """Whether SIGINT or SIGTERM was received."""
        return self._interrupt.is_set

    def elapsed(self) -> float:
        """Seconds since the stage started or was resumed."""
        return time.perf_counter() - self._start

    def rate(self, step: int) -> float:
        """Steps per second, where `step` steps are done."""
        return (step - self._first_step) / self.elapsed()

    def report(
        self, step: int, total: int, *, loss: float | None = None, rate: float | None = None, eta_seconds: float | None = None
    ) -> None:
        """Pass a `Progress` to the run; rate and remaining time follow from `step` and `total` unless they are given."""
        rate = self.rate(step) if rate is None else rate
        progress = Progress(
            stage=self._stage,
            step=step,
            total=total,
            loss=loss,
            rate=rate,
            eta_seconds=(total - step) / rate if eta_seconds is None else eta_seconds,
            memory_bytes=peak_memory(self._device),
        )
        self._run.on_progress(progress)

    def interruption(self, position: str) -> Interrupted:
        """The exception that ends an interrupted training after `position`; it states where the checkpoint is and how to resume."""
        return Interrupted(f"Interrupted after {position}; {saved_words(self._run)}")


def lost_after(position: str, run: Run) -> ProcessLostError:
    """The exception that ends a training after `position` because another of its processes ended."""
    if run.options.processes.writes or run.options.checkpoint is None:
        return ProcessLostError(f"This run lost a process after {position}; {saved_words(run)}")
    saved = f"its last checkpoint, if there is one, is in {run.options.checkpoint}. Run the same command with --resume to continue."
    return ProcessLostError(f"This run lost a process after {position}; {saved}")


def saved_words(run: Run) -> str:
    """Where the state of an ended run is, and how to resume it."""
    checkpoint = run.options.checkpoint
    if checkpoint is None:
        return "nothing was saved, because the run has no checkpoint directory."
    return f"the state is in {checkpoint}. Run the same command with --resume to continue."
