"""Calibration: what each site is fed at each row of its table, along trajectories, and the range that a recipe makes of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.interrupt import CtrlC
from calibration.layers import StudentLayer
from calibration.memory import peak_memory
from calibration.recipe import Interrupted, Progress, Recipe, Run
from calibration.student import Student, Teacher
from calibration.threads import each_in_a_thread
from calibration.trajectories import Trajectories
from edm_deploy.structure import scaled_input

SAMPLES_PER_BATCH = 1 << 14  # values kept of each site's input in one batch: enough for percentiles, and sorted in a millisecond
BATCH = 32


@dataclass(frozen=True)
class Observation:
    """What one site was fed at one row.

    Attributes:
        values: float32 [N], drawn at random from all values.
        low: The smallest of all values.
        high: The largest.
    """

    values: Tensor
    low: float
    high: float

    def __add__(self, other: Observation) -> Observation:
        """What was fed at either row."""
        return Observation(torch.cat([self.values, other.values]), min(self.low, other.low), max(self.high, other.high))

    def thinned(self, times: int, generator: torch.Generator) -> Observation:
        """One of so many values, drawn at random; the smallest and the largest are known still."""
        count = -(-len(self.values) // times)
        return Observation(self.values[torch.randint(len(self.values), (count,), generator=generator)], self.low, self.high)


class Observer:
    """Collects one site's input over the batches of one row. A forward pre-hook of the teacher's layer."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.parts: list[Tensor] = []
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Look at one batch; a pre-hook gets the layer and its arguments."""
        x = args[0]
        low, high = torch.aminmax(x)
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))
        flat = x.reshape(-1) if x.is_contiguous() else x.permute(0, *range(2, x.ndim), 1).reshape(-1)
        if flat.numel() > SAMPLES_PER_BATCH:
            flat = flat[torch.randint(flat.numel(), (SAMPLES_PER_BATCH,), generator=self.generator).to(flat.device)]
        self.parts.append(flat.float().cpu())

    def take(self) -> Observation:
        """The observation so far; the observer starts anew."""
        observation = Observation(torch.cat(self.parts), self.low, self.high)
        self.parts, self.low, self.high = [], 0.0, 0.0
        return observation


class Extremes:
    """The smallest and largest of all values that one site was fed, 0 among them. A forward pre-hook of the teacher's layer."""

    def __init__(self) -> None:
        self.low, self.high = 0.0, 0.0

    def __call__(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Look at one batch; a pre-hook gets the layer and its arguments."""
        low, high = torch.aminmax(args[0])
        self.low, self.high = min(self.low, float(low)), max(self.high, float(high))

    def take(self) -> tuple[float, float]:
        """Both; it starts anew."""
        found = self.low, self.high
        self.low, self.high = 0.0, 0.0
        return found


class InputMean:
    """The mean of each input channel over all batches of all rows. A forward pre-hook of the teacher's layer."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.batches = 0

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Look at one batch; a pre-hook gets the layer and its arguments."""
        x = args[0]
        channel = 1 if isinstance(layer, nn.Conv2d) else x.ndim - 1
        mean = x.mean(dim=[axis for axis in range(x.ndim) if axis != channel])
        self.total = mean if self.total is None else self.total + mean
        self.batches += 1

    def take(self) -> Tensor:
        """float32 [Cin]."""
        assert self.total is not None  # every site is run in every forward
        return self.total / self.batches


def _pre_scaled(layer: StudentLayer, see: Observer | InputMean) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """What a teacher's layer is fed, as the student's layer quantizes it: pre-scaled where that is."""
    return lambda teachers, args: see(teachers, (scaled_input(layer.layer, args[0]),))


@torch.no_grad()
def calibrate(student: Student, teacher: Teacher, trajectories: Trajectories, recipe: Recipe, run: Run) -> None:
    """Set every row of every activation table of the student, and correct its biases where the recipe says so; in place.

    The teacher leads the trajectories, unless a pass of the run lets the student lead: then each batch is first seen at its row by the teacher, whose
    layers are observed always, the row is set, and the student, quantized at this row and at all noisier ones, takes the samples one step on.
    The pool is left staggered over the schedule.

    Args:
        student: Its weight scales are set already.
        teacher: The network that is observed.
        trajectories: A fresh pool.
        recipe: Makes ranges of observations.
        run: For progress, and its passes.

    Raises:
        Interrupted: Ctrl-C; nothing is worth saving yet.
    """
    layers: Mapping[str, nn.Module] = {name: layer for name, layer in teacher.family.sites(teacher.model).items() if name in student.layers}
    generator = torch.Generator().manual_seed(recipe.seed)
    observers = {name: Observer(generator) for name in student.quantizers}
    means = {name: InputMean() for name in layers} if recipe.corrects_bias else {}
    seers: list[tuple[str, Observer | InputMean]] = [*observers.items(), *means.items()]
    handles = [layers[name].register_forward_pre_hook(_pre_scaled(student.layers[name], seer)) for name, seer in seers]
    specs = {name: recipe.specs(name, teacher.family.placement(name)) for name in student.quantizers}
    student_leads = any(chosen.student_leads for chosen in run.passes)
    pooled: dict[str, Observation] = {}
    start = time.perf_counter()
    try:
        with CtrlC() as interrupt:
            for done, (row, batches) in enumerate(trajectories.sweep(BATCH), start=1):
                for batch in batches:
                    prediction = teacher(batch.inputs)
                    if not student_leads:
                        trajectories.advance(batch, batch.conditioning.combine(prediction))
                seen = {name: observer.take() for name, observer in observers.items()}
                if recipe.static:
                    thinned = {name: observation.thinned(trajectories.rows, generator) for name, observation in seen.items()}
                    seen = pooled = {name: pooled[name] + one for name, one in thinned.items()} if pooled else thinned
                ranges = each_in_a_thread(lambda name: recipe.activation_range(seen[name], specs[name]), seen)  # noqa: B023  # run at once
                for quantizer, range_ in zip(student.quantizers.values(), ranges, strict=True):
                    quantizer.set_row(slice(None) if recipe.static else row, range_)
                for batch in batches if student_leads else ():
                    trajectories.advance(batch, batch.conditioning.combine(student(batch.inputs).float()))
                rate = done / (time.perf_counter() - start)
                left = (trajectories.rows - done) / rate
                device = trajectories.device
                run.on_progress(
                    Progress(
                        stage="calibrate",
                        step=done,
                        total=trajectories.rows,
                        loss=None,
                        rate=rate,
                        eta_seconds=left,
                        memory_bytes=peak_memory(device),
                    )
                )
                if interrupt.seen:
                    raise Interrupted("Interrupted while calibrating; nothing was written. Run the same command again.")
    finally:
        for handle in handles:
            handle.remove()
    for name, mean in means.items():
        student.layers[name].correct_bias(mean.take())
    for chosen in run.passes:
        assert run.scene is not None  # whoever runs passes says what they may look at
        chosen.calibrated(student, run.scene)
