"""Block reconstruction: each block in turn is trained to reproduce the float network's output from its input in the quantized network.

Source: Li et al., BRECQ, ICLR 2021, arXiv 2102.05426, as Q-Diffusion, arXiv 2302.04304, applies it: inputs from the quantized network, targets from
the float one, samples of all timesteps mixed. Each sample is quantized by its own row of the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import FORWARD_BATCH
from calibration.recipe import TrainingContext
from calibration.reconstruction.block_cache import BlockCache, ModelInputs, entropies_of, fill_block_cache
from calibration.reconstruction.block_optimizers import BlockOptimizer, quantizers_inside, train_only
from calibration.reconstruction.blocks import Partition, blocks_of
from calibration.reconstruction.time_allocation import TimeAllocation, training_steps
from calibration.run.checkpoint import CheckpointTimer, TrainingState, add_prefix, restore, resume_training, save_training, strip_prefix
from calibration.run.processes import Processes, ProcessLostError
from calibration.run.progress import ProgressMeter, lost_after
from calibration.student.student import Student, activations_unquantized
from calibration.training.divergence import check_finite
from calibration.training.fast_kernels import use_fast_kernels
from calibration.training.param_group import ParamGroup
from calibration.training.step_factors import row_factors, shared_step_factors
from edm_deploy.numerics.seeds import derived_seed

CACHE_SHARE = 0.25  # share of a budget that filling the caches may take
MAX_STEP = 0.1  # upper bound of every learning rate: with 60 steps per block, 0.2 rounds no better than this, and 0.05 worse
TOTAL = 1000  # progress is reported in thousandths of the work


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One pass over all blocks.

    Attributes:
        optimizers: What is trained of each block, jointly.
        steps: Training steps per block. Under a budget only their ratio between the stages matters.
        batch: Samples per step.
        samples: Number of samples; fewer are drawn if the steps, or the remaining budget, cannot use as many.
        draw: Returns the requested number of samples; None keeps those of the previous stage.
        quantizes_activations: Whether activations are quantized meanwhile.
    """

    optimizers: Sequence[BlockOptimizer]
    steps: int
    batch: int
    samples: int
    draw: Callable[[int], ModelInputs] | None = None
    quantizes_activations: bool = True


def reconstruct(context: TrainingContext, partition: Partition, stages: Sequence[Stage], *, seed: int, step_weighting: float = 0.0) -> None:
    """Reconstruct every block in every stage, in place.

    Finished blocks are saved at intervals, and always when a signal ends the run; an unfinished block starts again on resume.

    Args:
        context: The student is calibrated, unless a checkpoint is resumed; the teacher gives the targets, in the dtype of the run's options; the
            stages draw from the trajectories, whose state is part of the checkpoint. The remainder of the run's budget, if it has one, is divided
            over the blocks in proportion to their multiply-accumulates.
        partition: Granularity of the blocks.
        stages: Run one after the other; the first one draws samples.
        seed: Seed of the batch order.
        step_weighting: Power of the effect of each sampling step on the final sample that its samples' errors are multiplied by.

    Raises:
        Interrupted: a signal; finished blocks are saved if the run has a checkpoint directory.
        ArtifactError: The checkpoint to resume is missing, damaged or from a different run.
        InputError: The budget is already used up, or a loss is not finite.
    """
    run = context.run
    factors = shared_step_factors(context, step_weighting)  # before the teacher changes its dtype
    context.teacher.set_dtype(run.options.teacher_dtype)
    use_fast_kernels(context)
    work, timer = _Reconstruction(context, partition, stages, seed), CheckpointTimer(run)
    work.factors = row_factors(context, factors)
    done = work.resume(state) if (state := resume_training(run)) is not None else work.begin()
    with ProgressMeter(run, "reconstruct", context.trajectories.device, first_step=work.steps) as meter:
        for task in range(done, work.tasks):
            try:
                done += work.train_block(task, meter)
                interrupted = run.options.processes.any(meter.interrupted)
            except ProcessLostError as err:
                work.save(done)
                raise lost_after(work.position(done), run) from err
            if interrupted and done < work.tasks:
                work.save(done)
                raise meter.interruption(work.position(done))
            if done == work.tasks or timer.is_due():
                work.save(done)
    if work.budget is not None and not work.steps:
        work.budget.check_left("calibration with the forward passes that reconstruction needs")
    run.notes.update(steps_done=work.steps, blocks=len(work.blocks), samples=len(work.samples))


class _Reconstruction:
    """State between blocks. A task is one block in one stage, numbered stage by stage."""

    def __init__(self, context: TrainingContext, partition: Partition, stages: Sequence[Stage], seed: int) -> None:
        self.student, self.teacher, self.trajectories, self.run = context.student, context.teacher, context.trajectories, context.run
        self.partition, self.stages, self.seed = partition, stages, seed
        self.float_weights = {name: layer.layer.weight for name, layer in self.student.layers.items()}
        self.samples, self.sampled_stage = ModelInputs({}), -1  # samples, and the stage that they were drawn for
        self.budget, self.processes = self.run.budget, self.run.options.processes
        self.steps = 0
        self.factors = torch.ones(len(self.student.timesteps))  # of the errors of samples at each table row
        self.resumed_share = 0.0  # share of all training that was done when the run was resumed
        self.sample_seconds = 0.0  # time of student and teacher together for one sample; measured only under a budget

    @property
    def tasks(self) -> int:
        """Number of blocks, each counted once per stage."""
        return len(self.stages) * len(self.blocks)

    def begin(self) -> int:
        """Partition the model and draw the first samples; returns the blocks done, 0."""
        if self.budget is not None:
            self.budget.check_left("calibration")
        assert self.stages[0].draw is not None
        by_entropy = self.partition == "entropy"
        probe = self.stages[0].draw(FORWARD_BATCH) if by_entropy or self.budget is not None else ModelInputs({})
        self._divide(entropies_of(self.teacher, probe, self.student.layers) if by_entropy else {})
        self._measure_forward(probe)
        self._draw(0)
        return 0

    def _divide(self, entropies: Mapping[str, float]) -> None:
        self.entropies = entropies
        self.blocks = blocks_of(self.student, self.partition, entropies)
        self.allocation = TimeAllocation([block.macs for block in self.blocks], [stage.steps for stage in self.stages])

    @torch.no_grad()
    def _measure_forward(self, probe: ModelInputs) -> None:
        if self.budget is not None:
            start = time.perf_counter()
            for network in (self.student, self.teacher):
                network(probe.values)
            self.sample_seconds = (time.perf_counter() - start) / len(probe)

    def _draw(self, stage_index: int) -> None:
        stage = self.stages[stage_index]
        count = min(stage.samples, stage.steps * stage.batch)
        if self.budget is not None:
            passes = self.allocation.forward_passes(stage_index * len(self.blocks))
            affordable = int(CACHE_SHARE * self.budget.left() / (self.sample_seconds * passes))
            count = self.processes.first(min(count, max(FORWARD_BATCH, affordable)))
        if stage.draw is not None:
            self.samples = stage.draw(count)
        self.sampled_stage = stage_index

    def train_block(self, task: int, meter: ProgressMeter) -> bool:
        """Train one block in one stage. Returns False, with the block as before, if the run was interrupted."""
        stage_index, index = divmod(task, len(self.blocks))
        stage, block = self.stages[stage_index], self.blocks[index]
        if stage_index != self.sampled_stage:
            self._draw(stage_index)
        with nullcontext() if stage.quantizes_activations else activations_unquantized(self.student):
            start = time.perf_counter()
            cache = fill_block_cache(block, self.student, self.teacher, self.samples)
            self.allocation.record_cache(task, time.perf_counter() - start)
            layers = [self.student.layers[site] for site in block.sites]
            quantizers = quantizers_inside(self.student, block.sites)
            weights = [layer.layer.weight for layer in layers]
            trained = [
                (optimizer, group) for optimizer in stage.optimizers for group in optimizer.begin(layers, quantizers) if group.rate > 0
            ]
            with train_only(layers, quantizers, [group for _, group in trained]) as undo:
                generator = torch.Generator().manual_seed(derived_seed(self.seed, task))
                steps = _train(cache, self.student, self.factors, stage, trained, self._training_steps(task), generator, self.processes)
                before = self.steps

                def forget() -> None:
                    undo()
                    self.steps = before
                    for layer, weight in zip(layers, weights, strict=True):
                        layer.layer.weight, layer.rounding = weight, None

                try:
                    for count, (loss, share) in enumerate(steps, start=1):
                        self.steps += 1
                        check_finite(loss, f"step {count} of {self.position(task + 1)}")
                        self._report(meter, self.allocation.done(task, share), loss)
                        if self.processes.any(meter.interrupted):
                            forget()
                            return False
                except ProcessLostError:
                    forget()
                    raise
            for optimizer in stage.optimizers:
                optimizer.end(layers)
        return True

    def _training_steps(self, task: int) -> Iterator[tuple[float, float]]:
        steps = self.stages[task // len(self.blocks)].steps
        if self.budget is None:
            return training_steps(steps, None)
        return self.processes.each_first(training_steps(steps, self.budget.part(self.allocation.task_share(task, self.budget.left()))))

    def _report(self, meter: ProgressMeter, done: float, loss: float) -> None:
        estimate = meter.elapsed() * (1 - done) / max(done - self.resumed_share, 1e-9)
        left = estimate if self.budget is None else self.budget.left()
        meter.report(int(done * TOTAL), TOTAL, loss=loss, rate=meter.rate(self.steps), eta_seconds=left)

    def position(self, done: int) -> str:
        """In words, after `done` blocks."""
        return f"block {done} of {self.tasks}"

    def save(self, done: int) -> None:
        """Write a checkpoint after `done` blocks, if the run has a checkpoint directory."""
        if self.run.options.checkpoint is None:
            return
        weights = {name: layer.layer.weight for name, layer in self.student.layers.items()}
        method = add_prefix("weight.", {name: value for name, value in weights.items() if value is not self.float_weights[name]})
        method |= add_prefix("samples.", self.samples.values)
        method |= add_prefix("entropy.", {name: torch.tensor(value, dtype=torch.float64) for name, value in self.entropies.items()})
        method |= {"drawn": torch.tensor(self.sampled_stage), "steps": torch.tensor(self.steps), "row_factors": self.factors}
        parameters = self.student.checkpoint_parameters()
        state = TrainingState(step=done, parameters=parameters, trajectories=self.trajectories.state(), method=method, budget=self.budget)
        save_training(self.run, state, position=self.position(done), finished=done == self.tasks)

    @torch.no_grad()
    def resume(self, state: TrainingState) -> int:
        """Continue from `state`; returns the blocks done."""
        self.student.allocate_for_state(state.parameters)
        restore(self.student.checkpoint_parameters(), state.parameters)
        for name, value in strip_prefix("weight.", state.method).items():
            layer = self.student.layers[name].layer
            layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=torch.float32).copy_(value), requires_grad=False)
        self.trajectories.load_state(state.trajectories)
        samples = strip_prefix("samples.", state.method)
        self.samples = ModelInputs({name: value.to(self.trajectories.device) for name, value in samples.items()})
        self.factors = state.method["row_factors"]
        self.sampled_stage, self.steps = int(state.method["drawn"]), int(state.method["steps"])
        self.budget = state.budget
        self._measure_forward(self.samples.spread(FORWARD_BATCH))
        self._divide({name: float(value) for name, value in strip_prefix("entropy.", state.method).items()})
        self.resumed_share = self.allocation.done(state.step, 0.0) if state.step < self.tasks else 0.0
        return state.step


def _train(
    cache: BlockCache,
    student: Student,
    factors: Tensor,
    stage: Stage,
    trained: Sequence[tuple[BlockOptimizer, ParamGroup]],
    steps: Iterator[tuple[float, float]],
    generator: torch.Generator,
    processes: Processes,
) -> Iterator[tuple[float, float]]:
    """Train a block, each process on its share of every batch; yields the reconstruction error and the share of the training done after each step."""
    if not trained:
        return
    adam = torch.optim.Adam([{"params": list(group.parameters), "lr": 0.0} for _, group in trained], fused=True)
    batches = _batches(len(cache.rows), stage.batch, generator)
    for share, stride in steps:
        error = cache.reconstruction_error(student, next(batches)[processes.members(stage.batch)], factors)
        penalties = [penalty for optimizer in stage.optimizers if (penalty := optimizer.penalty(share)) is not None]
        adam.zero_grad(set_to_none=True)
        torch.stack([error, *penalties]).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        processes.average_gradients(parameter for _, group in trained for parameter in group.parameters)
        for entry, (optimizer, group) in zip(adam.param_groups, trained, strict=True):
            entry["lr"] = min(group.rate * stride, MAX_STEP) * optimizer.factor(share)
        adam.step()
        total = error.detach()
        processes.add([total])
        yield float(total) / processes.size, share + stride


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of samples, int64 [batch], shuffled: each sample occurs once before any occurs again."""
    order = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]
