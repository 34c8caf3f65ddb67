"""Block reconstruction: each block in turn learns to give the float network's output from what the quantized network before it feeds it.

Source: Li et al., BRECQ, ICLR 2021, arXiv 2102.05426, as Q-Diffusion, arXiv 2302.04304, applies it: inputs from the quantized network, targets from
the float one, samples of all timesteps mixed. Each sample is rounded by its own row of the tables.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import Trajectories
from calibration.reconstruction.block_cache import PASS, BlockCache, ModelInputs, entropies_of, fill_block_cache
from calibration.reconstruction.block_optimizers import BlockOptimizer, quantizers_inside, train_only
from calibration.reconstruction.blocks import Partition, blocks_of
from calibration.reconstruction.time_allocation import TimeAllocation, training_steps
from calibration.run.checkpoint import load_checkpoint, restore, save_checkpoint
from calibration.run.memory import peak_memory
from calibration.run.options import Progress, Run, interrupted
from calibration.run.sigint import InterruptFlag
from calibration.run.time_budget import Budget
from calibration.student.module_outputs import activations_unquantized
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher
from calibration.training.param_group import ParamGroup
from edm_deploy.network.family import meta_model

SAVING = 20  # between two checkpoints lies this many times what the first of them took
FILLING = 0.25  # share of a budget that filling the caches may take
LONGEST = 0.1  # bound of every step: with 60 steps a block, 0.2 rounds no better than this, and 0.05 worse
TOTAL = 1000  # progress counts thousandths of the work


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One walk over all blocks.

    Attributes:
        learners: What is learned, together.
        steps: Training steps a block. Where a budget decides, only their ratio between the stages counts.
        batch: Samples a step.
        samples: As many are drawn, unless fewer are enough for the steps, or for what a budget leaves.
        draw: Gives as many samples as it is asked for; None keeps those of the stage before.
        rounds_activations: Whether activations are rounded meanwhile, or pass as they are.
    """

    learners: Sequence[BlockOptimizer]
    steps: int
    batch: int
    samples: int
    draw: Callable[[int], ModelInputs] | None = None
    rounds_activations: bool = True


def reconstruct(
    student: Student, teacher: Teacher, trajectories: Trajectories, partition: Partition, stages: Sequence[Stage], run: Run, *, seed: int
) -> None:
    """Reconstruct every block in every stage, in place.

    A finished block is in the checkpoint soon after, and in any case when Ctrl-C ends the run; the block under way then begins anew.

    Args:
        student: Calibrated, unless a checkpoint is resumed.
        teacher: Gives the targets, in the dtype that the run's options say.
        trajectories: What the stages draw from; its state belongs to the checkpoint.
        partition: What a block is.
        stages: In turn; the first draws its samples.
        run: Options, progress, and perhaps a budget: then what is left of it is divided over the blocks by their multiply-accumulates.
        seed: Of the batches' order.

    Raises:
        Interrupted: Ctrl-C; the blocks that were finished are saved, where the run has a place for them.
        ArtifactError: The checkpoint to resume is not of this run.
        InputError: The budget is used up already.
    """
    teacher.set_dtype(DTYPES[run.options.teacher_dtype])
    work = _Work(student, teacher, trajectories, partition, stages, run, seed)
    done = work.resume() if run.options.resume else work.begin()
    with InterruptFlag() as interrupt:
        for number in range(done, work.count):
            finished = work.take(number, lambda: interrupt.seen)
            done += finished
            if interrupt.seen and done < work.count:
                work.save(done)
                raise interrupted(run, f"block {done} of {work.count}")
            if done == work.count or work.saving_pays():
                work.save(done)
    if work.budget is not None and not work.steps:
        work.budget.check_left("calibration with the walks over the network that reconstruction needs")
    run.notes.update(steps_done=work.steps, blocks=len(work.blocks), samples=len(work.samples))


class _Work:
    """What the walk over the blocks carries from one to the next."""

    def __init__(
        self,
        student: Student,
        teacher: Teacher,
        trajectories: Trajectories,
        partition: Partition,
        stages: Sequence[Stage],
        run: Run,
        seed: int,
    ) -> None:
        self.student, self.teacher, self.trajectories, self.partition = student, teacher, trajectories, partition
        self.stages, self.run, self.seed = stages, run, seed
        self.float_weights = {name: layer.layer.weight for name, layer in student.layers.items()}
        self.samples, self.drawn = ModelInputs({}), -1  # for the stage of this number
        self.budget = run.budget
        self.steps = self.steps_before = 0
        self.share_before = 0.0  # of all training, at a resumed run's start
        self.started = self.saved = time.perf_counter()
        self.saving = 0.0
        self.sample_seconds = 0.0  # of student and teacher together, for one sample; known where a budget asks for it

    @property
    def count(self) -> int:
        """Of blocks, each counted once a stage."""
        return len(self.stages) * len(self.blocks)

    def begin(self) -> int:
        """Part the model and draw the first samples; blocks done."""
        if self.budget is not None:
            self.budget.check_left("calibration")
        assert self.stages[0].draw is not None
        few = self.stages[0].draw(PASS) if self.partition == "entropy" or self.budget is not None else ModelInputs({})
        self._part(entropies_of(self.teacher, few, self.student.layers) if self.partition == "entropy" else {})
        self._time(few)
        self._draw(0)
        return 0

    def _part(self, entropies: Mapping[str, float]) -> None:
        self.entropies = entropies
        self.blocks = blocks_of(
            self.student, meta_model(self.student.family, self.student.config, self.student.structure), self.partition, entropies
        )
        self.plan = TimeAllocation([block.macs for block in self.blocks], [stage.steps for stage in self.stages])

    @torch.no_grad()
    def _time(self, few: ModelInputs) -> None:
        if self.budget is not None:
            begun = time.perf_counter()
            for network in (self.student, self.teacher):
                network(few.values)
            self.sample_seconds = (time.perf_counter() - begun) / len(few)

    def _draw(self, at: int) -> None:
        stage = self.stages[at]
        count = min(stage.samples, stage.steps * stage.batch)
        if self.budget is not None:
            passes = self.plan.passes(at * len(self.blocks))
            count = min(count, max(PASS, int(FILLING * self.budget.left() / (self.sample_seconds * passes))))
        if stage.draw is not None:
            self.samples = stage.draw(count)
        self.drawn = at

    def take(self, number: int, stopped: Callable[[], bool]) -> bool:
        """One block of one stage; False, and all of it as it was, where it was interrupted."""
        at, index = divmod(number, len(self.blocks))
        stage, block = self.stages[at], self.blocks[index]
        if at != self.drawn:
            self._draw(at)
        with nullcontext() if stage.rounds_activations else activations_unquantized(self.student):
            begun = time.perf_counter()
            replay = fill_block_cache(block, self.student, self.teacher, self.samples)
            self.plan.cached(number, time.perf_counter() - begun)
            layers = [self.student.layers[site] for site in block.sites]
            quantizers = quantizers_inside(self.student, block.sites)
            weights = [layer.layer.weight for layer in layers]
            learned = [(learner, group) for learner in stage.learners for group in learner.begin(layers, quantizers) if group.rate > 0]
            with train_only(layers, quantizers, [group for _, group in learned]) as undo:
                generator = torch.Generator().manual_seed(1_000_003 * self.seed + number)
                trained = _trained(replay, self.student, stage, learned, self._pace(number), generator)
                for count, (loss, share) in enumerate(trained, start=1):
                    self.steps += 1
                    self._report(number, share, loss)
                    if stopped():
                        undo()
                        self.steps -= count
                        for layer, weight in zip(layers, weights, strict=True):
                            layer.layer.weight, layer.rounding = weight, None
                        return False
            for learner in stage.learners:
                learner.end(layers)
        return True

    def saving_pays(self) -> bool:
        """Whether the last checkpoint is long enough ago."""
        return time.perf_counter() - self.saved >= SAVING * self.saving

    def save(self, done: int) -> None:
        """Write the state after `done` blocks, where there is a place for it."""
        if self.run.options.checkpoint is None:
            return
        begun = time.perf_counter()
        tensors: dict[str, Tensor] = {f"parameter.{name}": value for name, value in self.student.checkpoint_parameters().items()}
        for name, layer in self.student.layers.items():
            if layer.layer.weight is not self.float_weights[name]:
                tensors[f"weight.{name}"] = layer.layer.weight
        tensors |= {f"samples.{name}": value for name, value in self.samples.values.items()}
        tensors |= {"drawn": torch.tensor(self.drawn), "steps": torch.tensor(self.steps)}
        if self.budget is not None:
            tensors["budget"] = torch.tensor([self.budget.seconds, self.budget.used()], dtype=torch.float64)
        tensors |= {f"entropy.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.entropies.items()}
        tensors |= {f"trajectories.{name}": value for name, value in self.trajectories.state().items()}
        save_checkpoint(self.run.options.checkpoint, step=done, identity=self.run.identity, tensors=tensors)
        self.saved = time.perf_counter()
        self.saving = self.saved - begun

    @torch.no_grad()
    def resume(self) -> int:
        """Load the state; blocks done."""
        assert self.run.options.checkpoint is not None  # RunOptions sees to it
        done, tensors = load_checkpoint(self.run.options.checkpoint, self.run.identity)
        self.student.allocate_for_state(_under("parameter.", tensors))
        for name, value in self.student.checkpoint_parameters().items():
            restore(value, tensors[f"parameter.{name}"])
        for name, layer in self.student.layers.items():
            if f"weight.{name}" in tensors:
                weight = torch.empty_like(layer.layer.weight, dtype=torch.float32).copy_(tensors[f"weight.{name}"])
                layer.layer.weight = nn.Parameter(weight, requires_grad=False)
        self.trajectories.load_state(_under("trajectories.", tensors))
        self.samples = ModelInputs({name: value.to(self.trajectories.device) for name, value in _under("samples.", tensors).items()})
        self.drawn, self.steps = int(tensors["drawn"]), int(tensors["steps"])
        self.steps_before = self.steps
        if self.budget is not None:
            seconds, used = tensors["budget"].tolist()
            self.budget = Budget(seconds, used=used)
        self._time(self.samples.spread(PASS))
        self._part({name: float(value) for name, value in _under("entropy.", tensors).items()})
        self.share_before = self.plan.done(done, 0.0) if done < self.count else 0.0
        return done

    def _pace(self, number: int) -> Iterator[tuple[float, float]]:
        steps = self.stages[number // len(self.blocks)].steps
        return training_steps(steps, None if self.budget is None else self.budget.part(self.plan.part(number, self.budget.left())))

    def _report(self, number: int, share: float, loss: float) -> None:
        done = self.plan.done(number, share)
        passed = time.perf_counter() - self.started
        left = self.budget.left() if self.budget is not None else passed * (1 - done) / max(done - self.share_before, 1e-9)
        self.run.on_progress(
            Progress(
                stage="reconstruct",
                step=int(done * TOTAL),
                total=TOTAL,
                loss=loss,
                rate=(self.steps - self.steps_before) / passed,
                eta_seconds=left,
                memory_bytes=peak_memory(self.trajectories.device),
            )
        )


def _trained(
    replay: BlockCache,
    student: Student,
    stage: Stage,
    learned: Sequence[tuple[BlockOptimizer, ParamGroup]],
    steps: Iterator[tuple[float, float]],
    generator: torch.Generator,
) -> Iterator[tuple[float, float]]:
    """Train, and after each step give its distance and how much of the training is over."""
    if not learned:
        return
    optimizer = torch.optim.Adam([{"params": list(group.parameters), "lr": 0.0} for _, group in learned], fused=True)
    order = _batches(len(replay.rows), stage.batch, generator)
    for share, stride in steps:
        distance = replay.distance(student, next(order))
        penalties = [penalty for learner in stage.learners if (penalty := learner.penalty(share)) is not None]
        optimizer.zero_grad(set_to_none=True)
        torch.stack([distance, *penalties]).sum().backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for entry, (learner, group) in zip(optimizer.param_groups, learned, strict=True):
            entry["lr"] = min(group.rate * stride, LONGEST) * learner.factor(share)
        optimizer.step()
        yield float(distance.detach()), share + stride


def _batches(count: int, batch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of samples, int64 [batch]: each sample once before any comes again."""
    order = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:batch]
        order = order[batch:]


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
