"""Data-free distillation: the student is trained on the teacher's prediction along the teacher's sampling trajectories."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import Batch
from calibration.recipe import AuxiliaryLoss, TrainingContext
from calibration.run.checkpoint import CheckpointTimer, TrainingState, restore, resume_training, save_training
from calibration.run.processes import ProcessLostError
from calibration.run.progress import ProgressMeter, lost_after
from calibration.run.reports import Reporter
from calibration.run.time_budget import Budget
from calibration.student.module_outputs import capture_outputs
from calibration.training.activation_checkpoints import checkpoint_activations
from calibration.training.divergence import check_finite, warn_if_few, warn_if_risen
from calibration.training.fast_kernels import use_fast_kernels
from calibration.training.param_group import ParamGroup
from calibration.training.sharded_weights import sharded
from calibration.training.step_factors import shared_step_factors

MOST_LAST = 100  # losses at the end that are compared with the first
FIRST_STEPS = 3  # of a budget, before the number of its steps is estimated
Decay = Literal["linear", "cosine"]


@dataclass(frozen=True)
class TrainingSchedule:
    """Number of steps and learning-rate schedule: linear warm-up over the first `warmup` share of the steps, multiplied by a decay to 0.

    Attributes:
        steps: Training steps.
        batch: Samples per step.
        warmup: 0 to 1.
        relative: Power of the target's mean square that each sample's squared error is divided by: 0 is the absolute error, 1 the relative one.
        step_weighting: Power of the effect of each sampling step on the final sample, `step_weights`, that each sample's squared error is multiplied by;
            0 weights all steps alike. The factors are scaled to a mean of 1 over the steps.
        decay: `linear`, or half a `cosine`.
        scale_rates_to: Number of steps that the rates are meant for: all rates are multiplied by `(scale_rates_to / steps)^0.5`. 0 leaves them as they are.
        ema: Decay per step of the exponential moving average that replaces the trained parameters at the end; 0 is no average.
    """

    steps: int
    batch: int
    warmup: float = 0.0
    relative: float = 0.0
    step_weighting: float = 0.0
    decay: Decay = "linear"
    scale_rates_to: int = 0
    ema: float = 0.0

    def factor(self, share: float, steps: float | None = None) -> float:
        """Factor of the learning rates.

        Args:
            share: Share of the training that is done, 0 to 1: steps done / steps, or the share of a budget's wall time.
            steps: Expected number of steps under a budget; None is `steps` of the schedule.
        """
        # One step ahead, so that the first step's rate is not 0.
        rise = min((share + 1 / self.steps) / self.warmup, 1.0) if self.warmup else 1.0
        fall = 1 - share if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * share))
        length = math.sqrt(self.scale_rates_to / (steps or self.steps)) if self.scale_rates_to else 1.0
        return rise * fall * length

    def average_decay(self, step: int) -> float:
        """Decay of the average at step `step`, counted from 1: `ema`, and less in the first steps, so that the initial values do not dominate."""
        return min(self.ema, (1 + step) / (10 + step))


@dataclass(frozen=True)
class Part:
    """Samples of a training batch that run through the student together.

    Attributes:
        batch: The samples.
        target: float32 [B, ...], the teacher's prediction, combined under guidance.
        outputs: Outputs of the teacher's modules that the auxiliary losses compare, by name.
    """

    batch: Batch
    target: Tensor
    outputs: Mapping[str, Tensor]


class Training:
    """State of a training run between two steps: parameters, optimizer, trajectory pool.

    Args:
        context: Calibrated student, teacher, and a pool staggered over the schedule.
        groups: Trained parameters; groups with rate 0 stay fixed.
        schedule: Steps, batch and learning-rate schedule.
        terms: Auxiliary losses, added to the error of the prediction.
        step_factors: float32 [R], factor of the squared error at each sampling step, in sampling order; None is 1 for all.
    """

    def __init__(
        self,
        context: TrainingContext,
        groups: Sequence[ParamGroup],
        schedule: TrainingSchedule,
        terms: Sequence[AuxiliaryLoss] = (),
        step_factors: Tensor | None = None,
    ) -> None:
        self.student, self.teacher, self.trajectories = context.student, context.teacher, context.trajectories
        self.schedule, self.terms, self.done = schedule, terms, 0
        use_fast_kernels(context)
        self.processes, self.accumulation = context.run.options.processes, context.run.options.accumulation
        self.step_factors = torch.ones(self.trajectories.rows) if step_factors is None else step_factors
        self.outputs: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
        trained_groups = [group for group in groups if group.parameters and group.rate > 0]
        trained = {id(parameter) for group in trained_groups for parameter in group.parameters}
        # All of the student's parameters, not only the learnable ones: recipes that train weights and biases train parameters of the model itself.
        self.trained = {name: parameter for name, parameter in self.student.named_parameters() if id(parameter) in trained}
        for name, parameter in self.student.named_parameters():
            parameter.requires_grad_(name in self.trained)
        self.averages = {name: value.detach().clone() for name, value in self.trained.items()} if schedule.ema else {}
        self.rates = [group.rate for group in trained_groups]
        # No weight decay: it would shrink every row of every table at every step.
        self.optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": group.rate} for group in trained_groups], fused=True)

    @contextmanager
    def outputs_captured(self) -> Iterator[None]:
        """Capture the module outputs that the auxiliary losses compare."""
        names = list(dict.fromkeys(name for term in self.terms for name in term.modules))
        with capture_outputs(self.student.model, names) as student, capture_outputs(self.teacher.model, names) as teacher:
            self.outputs = student, teacher
            yield
        self.outputs = {}, {}

    def weights_sharded(self) -> AbstractContextManager[None]:
        """Divide frozen weights among the processes; after a state was loaded."""
        return sharded(self.student, self.teacher, list(self.trained.values()), self.processes, self.trajectories.device)

    def step(self, share: float, steps: float | None = None) -> float:
        """Take one training step; returns the loss, a mean over the batch of summed squared errors. Arguments as those of `TrainingSchedule.factor`."""
        first = self.trajectories.next_index
        batch = self.trajectories.next_batch(self.schedule.batch)
        try:
            loss, target = self._backward(batch)
        except ProcessLostError:
            self.trajectories.next_index = first  # nothing else has changed: the state is that before this step
            raise
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.schedule.factor(share, steps)
        self.optimizer.step()
        self.done += 1
        for name, average in self.averages.items():
            average.lerp_(self.trained[name].detach(), 1 - self.schedule.average_decay(self.done))
        self.trajectories.advance(batch, target)
        return loss

    def _backward(self, batch: Batch) -> tuple[float, Tensor]:
        """Compute the gradients of the mean loss of a batch, each process those of its share, part by part; returns the loss, and the whole batch's target."""
        own = batch.part(self.processes.members(len(batch)))
        parts = [
            self._part(own.part(slice(start, start + size)))
            for size in [len(own) // self.accumulation]
            for start in range(0, len(own), size)
        ]
        statistics = self._statistics(parts)
        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        for part in parts:
            loss = self._loss(part, statistics) / len(parts)
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            losses.append(loss.detach())
        self.processes.average_gradients(self.trained.values())
        total = torch.stack(losses).sum()
        self.processes.add([total])
        target = self.processes.gather(torch.cat([part.target for part in parts]), len(batch))
        return float(total) / self.processes.size, target

    def _part(self, batch: Batch) -> Part:
        target = batch.conditioning.combine(self.teacher(batch.inputs))
        return Part(batch, target, dict(self.outputs[1]))

    def _statistics(self, parts: Sequence[Part]) -> list[Tensor]:
        """Those of each auxiliary loss, averaged over the parts of all processes: a ratio of two means is not a mean of ratios."""
        found = [torch.stack([term.statistics(part.outputs) for part in parts]).mean(0) for term in self.terms]
        self.processes.add(found)
        return [each / self.processes.size for each in found]

    @torch.no_grad()
    def finish(self) -> None:
        """Replace the trained parameters by their averages, if there are any."""
        for name, average in self.averages.items():
            self.trained[name].copy_(average)

    def state(self, step: int, budget: Budget | None) -> TrainingState:
        """State after `step` steps."""
        # The rates that follow weight scales were set before training moved the scales.
        method = {"rates": torch.tensor(self.rates, dtype=torch.float64), "step_factors": self.step_factors}
        for name, parameter in self.trained.items():
            method |= {f"optimizer.{key}.{name}": value for key, value in self.optimizer.state[parameter].items()}
        method |= {f"average.{name}": value for name, value in self.averages.items()}
        parameters = {name: value.detach() for name, value in self._checkpoint_parameters().items()}
        return TrainingState(step=step, parameters=parameters, trajectories=self.trajectories.state(), method=method, budget=budget)

    @torch.no_grad()
    def load_state(self, state: TrainingState) -> None:
        """Continue from `state`."""
        self.done = state.step
        self.student.allocate_for_state(state.parameters)
        restore(self._checkpoint_parameters(), state.parameters)
        self.rates, self.step_factors = state.method["rates"].tolist(), state.method["step_factors"]
        for name, parameter in self.trained.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if (value := state.method.get(f"optimizer.{key}.{name}")) is not None:
                    # In the parameter's memory layout: fused Adam iterates over the raw memory of both.
                    like = parameter if value.shape == parameter.shape else value
                    self.optimizer.state[parameter][key] = torch.empty_like(like, device=parameter.device).copy_(value)
        for name, average in self.averages.items():
            average.copy_(state.method[f"average.{name}"])
        self.trajectories.load_state(state.trajectories)

    def _checkpoint_parameters(self) -> dict[str, nn.Parameter]:
        return self.student.checkpoint_parameters() | self.trained  # float weights only where they are trained

    def _loss(self, part: Part, statistics: Sequence[Tensor]) -> Tensor:
        batch, target = part.batch, part.target
        factors = self.step_factors[self.trajectories.position[batch.indices]].to(batch.sample.device)
        # Source: EfficientDM, arXiv 2310.03270: under guidance the loss is on the combined prediction, which sampling uses.
        prediction = batch.conditioning.combine(self.student(batch.inputs).float())
        errors = (prediction - target).square().flatten(1).sum(1)
        power = target.square().flatten(1).mean(1)
        mean: Tensor = (factors * errors / power.pow(self.schedule.relative)).mean()
        terms = zip(self.terms, statistics, strict=True)
        return sum((term(self.outputs[0], part.outputs, values) for term, values in terms), start=mean)


def distill(
    context: TrainingContext, groups: Sequence[ParamGroup], schedule: TrainingSchedule, *, terms: Sequence[AuxiliaryLoss] = ()
) -> None:
    """Train the student in place, for the schedule's number of steps or for the remaining wall time of the run's budget.

    Arguments as those of `Training`. Numbers in the run's notes are saved in its checkpoints.

    Raises:
        InputError: Calibration used up the budget, or the loss is not finite.
        Interrupted: SIGINT, SIGTERM or SIGHUP; the current step was finished and a checkpoint written, if the run has a checkpoint directory.
        ProcessLostError: Another process of the run ended; process 0 has written a checkpoint of the last step that all finished.
        ArtifactError: The checkpoint to resume is missing, damaged or from a different run.
    """
    run, processes = context.run, context.run.options.processes
    factors = shared_step_factors(context, schedule.step_weighting)  # before the teacher changes its dtype
    context.teacher.set_dtype(run.options.teacher_dtype)
    training = Training(context, groups, schedule, [*terms, *context.terms], factors)
    if run.options.checkpointing:  # after the kernels were chosen: what is computed again is computed by the same ones
        checkpoint_activations(context.student)
    done, budget, timer, every = 0, None, CheckpointTimer(run), run.options.checkpoint_every
    if (state := resume_training(run)) is not None:
        training.load_state(state)
        done, budget = state.step, state.budget
    elif run.budget is not None:
        run.budget.check_left("calibration")
        budget = run.budget.part()
    reporter = Reporter(run.options.report, run.preview, context.student, context.teacher, schedule.steps)
    last: deque[float] = deque(maxlen=max(1, min(MOST_LAST, schedule.steps // 10)))

    def position(step: int) -> str:
        return f"step {step} of {schedule.steps}" if budget is None else f"step {step}"

    def done_share() -> float:
        return done / schedule.steps if budget is None else processes.first(budget.share())  # by one clock

    weights = training.weights_sharded() if run.options.sharding else nullcontext()
    with ProgressMeter(run, "finetune", context.trajectories.device, first_step=done) as meter, training.outputs_captured(), weights:
        try:
            while (share := done_share()) < 1:
                loss = training.step(share, done / share if budget is not None and done >= FIRST_STEPS else None)
                done += 1
                check_finite(loss, position(done))
                run.notes.setdefault("first_loss", loss)
                last.append(loss)
                total = schedule.steps if budget is None else done + round(budget.left() * meter.rate(done))
                meter.report(done, total, loss=loss)
                finished, interrupted = done_share() >= 1, processes.any(meter.interrupted)
                reporter.after(done, {"loss": loss, "rate_factor": schedule.factor(share)}, finished=finished)
                if interrupted or finished or timer.is_due() or (every is not None and done % every == 0):
                    save_training(run, training.state(done, budget), position=position(done), finished=finished)
                if interrupted and not finished:
                    raise meter.interruption(position(done))
        except ProcessLostError as err:
            save_training(run, training.state(done, budget), position=position(done), finished=False)
            raise lost_after(position(done), run) from err
    training.finish()
    warn_if_risen(run.notes.get("first_loss", math.inf), last)
    if budget is not None:
        run.notes["steps_done"] = done
        warn_if_few(done, run.options.budget_seconds or budget.seconds)
