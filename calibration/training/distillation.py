"""Training without data: the student learns the teacher's prediction on the teacher's own trajectories."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import Batch, Trajectories
from calibration.run.checkpoint import load_checkpoint, restore, save_checkpoint
from calibration.run.memory import peak_memory
from calibration.run.options import Progress, Run, interrupted
from calibration.run.sigint import InterruptFlag
from calibration.run.time_budget import Budget
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher
from calibration.training.losses import AuxiliaryLoss, capture_outputs
from calibration.training.param_group import ParamGroup
from edm_deploy.errors import InputError


@dataclass(frozen=True)
class TrainingSchedule:
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

    def factor(self, share: float) -> float:
        """What rates are multiplied by when `share` of the training is behind, 0 to 1: step / steps, or a budget's share of wall time."""
        # One step on, so that the first step's rate is not 0.
        return min((share + 1 / self.steps) / self.warmup, 1.0) * (1 - share) if self.warmup else 1 - share


class Training:
    """The state of a run between two steps: parameters, optimizer, pool.

    Args:
        student: Calibrated.
        teacher: Leads.
        trajectories: Staggered over the schedule.
        groups: What is learned.
        schedule: How long and how fast.
        terms: What the loss counts beside the prediction.
    """

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        trajectories: Trajectories,
        groups: Sequence[ParamGroup],
        schedule: TrainingSchedule,
        terms: Sequence[AuxiliaryLoss] = (),
    ) -> None:
        self.student, self.teacher, self.trajectories, self.schedule, self.terms = student, teacher, trajectories, schedule, terms
        self.outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        chosen = [group for group in groups if group.parameters and group.rate > 0]
        learned = {id(parameter) for group in chosen for parameter in group.parameters}
        # Not the learnable ones alone: weights and biases that a recipe trains themselves are parameters of the model.
        self.names = {name: parameter for name, parameter in student.named_parameters() if id(parameter) in learned}
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in self.names)
        self.rates = [group.rate for group in chosen]
        # No weight decay: it would shrink every row of every table at every step.
        self.optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": group.rate} for group in chosen], fused=True)

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Within it the terms see what they compare."""
        names = list(dict.fromkeys(name for term in self.terms for name in term.modules))
        with capture_outputs(self.student.model, names) as student, capture_outputs(self.teacher.model, names) as teacher:
            self.outputs = student, teacher
            yield
        self.outputs = {}, {}

    def step(self, share: float) -> float:
        """One training step, when `share` of the training is behind; the loss, a mean over the batch of squared distances."""
        batch = self.trajectories.take(self.schedule.batch)
        target = batch.conditioning.combine(self.teacher(batch.inputs))
        loss = self._loss(batch, target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.factor(share)
        self.optimizer.step()
        self.trajectories.advance(batch, target)
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        """Everything that decides what comes next, by name."""
        state = {f"parameter.{name}": value.detach() for name, value in self._kept().items()}
        state["rates"] = torch.tensor(self.rates, dtype=torch.float64)  # where they follow scales, training has moved those since
        for name, parameter in self.names.items():
            state |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        return state | {f"trajectories.{name}": value for name, value in self.trajectories.state().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        self.student.allocate_for_state(name.removeprefix("parameter.") for name in state)
        for name, value in self._kept().items():
            restore(value, state[f"parameter.{name}"])
        self.rates = state["rates"].tolist()
        for name, parameter in self.names.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (found := state.get(f"optimizer.{key}.{name}")) is not None:
                    # In the parameter's own layout: fused Adam walks both as they lie in memory.
                    like = parameter if found.shape == parameter.shape else found
                    self.optimizer.state[parameter][key] = torch.empty_like(like, device=parameter.device).copy_(found)
        self.trajectories.load_state(
            {name.removeprefix("trajectories."): value for name, value in state.items() if name.startswith("trajectories.")}
        )

    def _kept(self) -> dict[str, nn.Parameter]:
        return self.student.checkpoint_parameters() | self.names  # float weights are there only where they are learned

    def _loss(self, batch: Batch, target: Tensor) -> Tensor:
        # Source: EfficientDM, arXiv 2310.03270: a guided model is trained on the combined prediction, which its samples are made of.
        prediction = batch.conditioning.combine(self.student(batch.inputs).float())
        distances = (prediction - target).square().flatten(1).sum(1)
        power = target.square().flatten(1).mean(1)
        mean: Tensor = (distances / power.pow(self.schedule.relative)).mean()
        return sum((term(*self.outputs) for term in self.terms), start=mean)


def distill(
    student: Student,
    teacher: Teacher,
    trajectories: Trajectories,
    groups: Sequence[ParamGroup],
    schedule: TrainingSchedule,
    run: Run,
    *,
    terms: Sequence[AuxiliaryLoss] = (),
) -> None:
    """Train the student in place: the schedule's steps, or as many as what is left of the run's budget allows.

    What the run's notes say by numbers is kept in its checkpoints.

    Raises:
        InputError: Calibration has used the budget up.
        Interrupted: Ctrl-C; the step under way was finished and a checkpoint written, where the run has a place for one.
        ArtifactError: The checkpoint to resume is not of this run.
    """
    teacher.set_dtype(DTYPES[run.options.teacher_dtype])
    training = Training(student, teacher, trajectories, groups, schedule, terms)
    options, done, budget = run.options, 0, None
    if options.resume and options.checkpoint is not None:
        done, state = load_checkpoint(options.checkpoint, run.identity)
        training.load_state(state)
        run.notes.update({name.removeprefix("note."): value.item() for name, value in state.items() if name.startswith("note.")})
        if run.budget is not None:
            seconds, used = state["budget"].tolist()
            budget = Budget(seconds, used=used)
    elif run.budget is not None:
        run.budget.check_left("calibration")
        budget = run.budget.part()

    def save() -> None:
        if options.checkpoint is not None:
            spent = {} if budget is None else {"budget": torch.tensor([budget.seconds, budget.used()], dtype=torch.float64)}
            numbers = {name: value for name, value in run.notes.items() if isinstance(value, int | float)}
            # In float64, so that a float comes back as it was; integers are int64 by themselves.
            noted = {
                f"note.{name}": torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
                for name, value in numbers.items()
            }
            save_checkpoint(options.checkpoint, step=done, identity=run.identity, tensors=training.state() | noted | spent)

    start, first = time.perf_counter(), done
    with InterruptFlag() as interrupt, training.tapped():
        while (share := done / schedule.steps if budget is None else budget.share()) < 1:
            loss = training.step(share)
            done += 1
            rate = (done - first) / (time.perf_counter() - start)
            total = schedule.steps if budget is None else done + round(budget.left() * rate)
            finished = done == total if budget is None else budget.share() >= 1
            run.on_progress(
                Progress(
                    stage="finetune",
                    step=done,
                    total=total,
                    loss=loss,
                    rate=rate,
                    eta_seconds=(total - done) / rate,
                    memory_bytes=peak_memory(trajectories.device),
                )
            )
            if interrupt.seen or done % options.checkpoint_every == 0 or finished:
                save()
            if interrupt.seen and not finished:
                raise interrupted(run, f"step {done}")
    if budget is not None:
        run.notes["steps_done"] = done


def refuse_compute(found: str) -> NoReturn:
    """Raises InputError for a dtype that the student cannot compute in."""
    raise InputError(f"compute is {found!r}; expected {' or '.join(DTYPES)}. Set another compute.")
