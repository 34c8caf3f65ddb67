"""Training without data: the student learns the teacher's prediction on the teacher's own trajectories."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from calibration.checkpoint import load_checkpoint, save_checkpoint
from calibration.interrupt import CtrlC
from calibration.memory import peak_memory
from calibration.recipe import Interrupted, Progress, Run
from calibration.student import DTYPES, Student, Teacher
from calibration.trajectories import Batch, Trajectories
from edm_deploy.errors import InputError


@dataclass(frozen=True)
class Group:
    """Parameters that share a rate; a rate of 0 leaves them as they are."""

    parameters: Sequence[nn.Parameter]
    rate: float


@dataclass(frozen=True)
class Schedule:
    """How long, and how the rates change: up over the first `warmup` share of the steps, then linearly down to 0.

    Attributes:
        steps: Training steps.
        batch: Samples a step.
        warmup: 0 to 1.
        relative: Each sample's squared distance is divided by its target's mean square to this power: 0 counts absolute errors, 1 relative ones.
    """

    steps: int
    batch: int
    warmup: float = 0.0
    relative: float = 0.0

    def factor(self, step: int) -> float:
        """What rates are multiplied by at `step`, which counts from 0."""
        rising = self.warmup * self.steps
        return min((step + 1) / rising, 1.0) * (1 - step / self.steps) if rising else 1 - step / self.steps


class Training:
    """The state of a run between two steps: parameters, optimizer, pool.

    Args:
        student: Calibrated.
        teacher: Leads.
        trajectories: Staggered over the schedule.
        groups: What is learned.
        schedule: How long and how fast.
    """

    def __init__(self, student: Student, teacher: Teacher, trajectories: Trajectories, groups: Sequence[Group], schedule: Schedule) -> None:
        self.student, self.teacher, self.trajectories, self.schedule = student, teacher, trajectories, schedule
        chosen = [group for group in groups if group.parameters and group.rate > 0]
        learned = {id(parameter) for group in chosen for parameter in group.parameters}
        self.names = {name: parameter for name, parameter in student.learnable().items() if id(parameter) in learned}
        for name, parameter in student.learnable().items():
            parameter.requires_grad_(name in self.names)
        self.rates = [group.rate for group in chosen]
        # No weight decay: it would shrink every row of every table at every step.
        self.optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": group.rate} for group in chosen], fused=True)

    def step(self, number: int) -> float:
        """One training step; the loss, a mean over the batch of squared distances."""
        batch = self.trajectories.take(self.schedule.batch)
        target = batch.conditioning.combine(self.teacher(batch.inputs))
        loss = self._loss(batch, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.factor(number)
        self.optimizer.step()
        self.trajectories.advance(batch, target)
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, by name."""
        state = {f"parameter.{name}": value.detach() for name, value in self.student.learnable_or_fixed().items()}
        for name, parameter in self.names.items():
            state |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return state | {f"trajectories.{name}": value for name, value in self.trajectories.state().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for name, value in self.student.learnable_or_fixed().items():
            value.copy_(state[f"parameter.{name}"])
        for name, parameter in self.names.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"optimizer.{key}.{name}" in state:
                    self.optimizer.state[parameter][key] = state[f"optimizer.{key}.{name}"].to(parameter.device)
        self.trajectories.load_state(
            {name.removeprefix("trajectories."): value for name, value in state.items() if name.startswith("trajectories.")}
        )

    def _loss(self, batch: Batch, target: Tensor) -> Tensor:
        # Source: EfficientDM, arXiv 2310.03270: a guided model is trained on the combined prediction, which its samples are made of.
        prediction = batch.conditioning.combine(self.student(batch.inputs).float())
        distances = (prediction - target).square().flatten(1).sum(1)
        power = target.square().flatten(1).mean(1)
        mean: Tensor = (distances / power.pow(self.schedule.relative)).mean()
        return mean


def distill(student: Student, teacher: Teacher, trajectories: Trajectories, groups: Sequence[Group], schedule: Schedule, run: Run) -> None:
    """Train the student in place.

    Raises:
        Interrupted: Ctrl-C; the step under way was finished and a checkpoint written, where the run has a place for one.
        ArtifactError: The checkpoint to resume is not of this run.
    """
    teacher.lead_in(DTYPES[run.options.teacher_dtype])
    training = Training(student, teacher, trajectories, groups, schedule)
    options, first = run.options, 0
    if options.resume and options.checkpoint is not None:
        first, state = load_checkpoint(options.checkpoint, run.identity)
        training.load_state(state)

    def save(done: int) -> None:
        if options.checkpoint is not None:
            save_checkpoint(options.checkpoint, step=done, identity=run.identity, tensors=training.state())

    start = time.perf_counter()
    with CtrlC() as interrupt:
        for number in range(first, schedule.steps):
            loss = training.step(number)
            done = number + 1
            rate = (done - first) / (time.perf_counter() - start)
            left = (schedule.steps - done) / rate
            run.on_progress(
                Progress(
                    stage="finetune",
                    step=done,
                    total=schedule.steps,
                    loss=loss,
                    rate=rate,
                    eta_seconds=left,
                    memory_bytes=peak_memory(trajectories.device),
                )
            )
            if interrupt.seen or done % options.checkpoint_every == 0 or done == schedule.steps:
                save(done)
            if interrupt.seen and done < schedule.steps:
                raise Interrupted(_interrupted(done, run))


def refuse_compute(found: str) -> NoReturn:
    """Raises InputError for a dtype that the student cannot compute in."""
    raise InputError(f"compute is {found!r}; expected {' or '.join(DTYPES)}. Set another compute.")


def _interrupted(done: int, run: Run) -> str:
    if run.options.checkpoint is None:
        return f"Interrupted after step {done}; nothing was saved, because the run has no checkpoint directory."
    return f"Interrupted after step {done}; the state is in {run.options.checkpoint}. Run the same command with --resume to go on."
