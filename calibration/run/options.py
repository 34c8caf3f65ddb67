"""Options, progress and interruption of a calibration or training run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from calibration.run.setting_checks import at_least
from calibration.run.time_budget import Budget
from edm_deploy.errors import EdmDeployError, InputError


class Interrupted(EdmDeployError):  # noqa: N818  # it is no error, and callers read `except Interrupted`
    """Ctrl-C was heeded; the message says what was saved and how to go on."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the work has come.

    Attributes:
        stage: What is being done, `calibrate` or `finetune`.
        step: Steps done.
        total: Steps in all.
        loss: Of the last step; None where nothing is trained.
        rate: Steps a second.
        eta_seconds: Seconds left in this stage.
        memory_bytes: Peak memory of the process, or of the accelerator.
    """

    stage: str
    step: int
    total: int
    loss: float | None
    rate: float
    eta_seconds: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run needs beside its settings; of these only the teacher's dtype and the prompts change what a finished run computes.

    Attributes:
        device: Where the student and the teacher live.
        teacher_dtype: Of the teacher's weights and activations while it leads the training.
        checkpoint: Directory for checkpoints; None writes none.
        resume: Whether to go on from `checkpoint`.
        checkpoint_every: Training steps between checkpoints.
        fold_time: Whether layers that see the timestep alone stay in floating point, for exporters to make a table of.
        prompts: What models that take text are told; None is the built-in list.
        budget_seconds: Wall time of calibration and training together; training then goes by the clock and not by a number of steps, and the
            run is not reproducible bit for bit. None trains as many steps as the recipe says.
    """

    device: str = "cpu"
    teacher_dtype: Literal["fp32", "bf16"] = "bf16"
    checkpoint: Path | None = None
    resume: bool = False
    checkpoint_every: int = 100
    # Measured on the reference model at W4A4: noise error 0.0199 with the table, 0.0197 without, and an artifact larger by a fifth.
    fold_time: bool = False
    prompts: Path | None = None
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        at_least("checkpoint_every", self.checkpoint_every, 1)
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise InputError(f"budget_seconds is {self.budget_seconds}; expected above 0. Set another budget.")
        if self.resume and self.checkpoint is None:
            raise InputError("resume is set but there is no checkpoint directory to resume from. Name one, or start anew without --resume.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way, as `Recipe.fit` sees it.

    Attributes:
        options: As the user gave them.
        identity: What a checkpoint must have been made with to be resumed: recipe, settings, teacher.
        on_progress: Called after each step.
        student_leads: Whether the student, not the teacher, leads the trajectories that ranges are observed on.
        after_calibration: Called once all ranges are set, before anything is trained; None where there is nothing to do.
        budget: Wall time, counted from the run's start; None where training goes by its number of steps.
        notes: What the recipe did that its settings do not tell, for the provenance: steps done under a budget and the like. Filled by `fit`.
    """

    options: RunOptions
    identity: dict[str, Any]  # json
    on_progress: Callable[[Progress], None]
    student_leads: bool = False
    after_calibration: Callable[[], None] | None = None
    budget: Budget | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # json


def interrupted(run: Run, after: str) -> Interrupted:
    """What a run raises that heeds Ctrl-C, `after` what: it says where the state is and how to go on."""
    if run.options.checkpoint is None:
        return Interrupted(f"Interrupted after {after}; nothing was saved, because the run has no checkpoint directory.")
    return Interrupted(f"Interrupted after {after}; the state is in {run.options.checkpoint}. Run the same command with --resume to go on.")
