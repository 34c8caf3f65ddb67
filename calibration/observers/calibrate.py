"""Calibration: observe the input of every layer at each timestep row along sampling trajectories, and set the activation tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples, Share
from calibration.data.trajectory_pool import FORWARD_BATCH, Batch
from calibration.observers.observers import InputMean, Observer, merged
from calibration.observers.stagger import stagger
from calibration.recipe import Recipe, TrainingContext
from calibration.run.options import Interrupted
from calibration.run.processes import Processes, check_shares
from calibration.run.progress import ProgressMeter
from calibration.student.layers import StudentLayer
from calibration.student.module_outputs import input_hooks
from calibration.student.student import Student
from edm_deploy.network.restructure import site_input

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


@dataclass(frozen=True, kw_only=True)
class CalibrationRecipe(Recipe):
    """Base of the recipes without training: observes activations along the teacher's trajectories and sets every row of every table.

    Recipes that train start from its result.
    """

    def fit(self, context: TrainingContext) -> None:
        """Set the student's ranges and scales, in place; those of an artifact are kept."""
        if context.run.from_artifact:
            stagger(context)
        else:
            calibrate(context, self)


@torch.no_grad()
def calibrate(context: TrainingContext, recipe: Recipe) -> None:
    """Set every row of every activation table of the student, and correct its biases if the recipe does so; in place.

    The teacher leads the trajectories and its layers are observed. If a pass of the run lets the student lead, the student's own layers are observed:
    each range is set before the layers after it run, so that their inputs are those of the network quantized at this row and at all noisier ones.
    The student then takes the sampling step. The pool is left staggered over the schedule.

    Args:
        context: A student whose weight scales are set, the teacher, and a new pool.
        recipe: Computes ranges from observations.

    Raises:
        Interrupted: SIGINT or SIGTERM; there is no state worth saving yet.
    """
    student, teacher, trajectories, run = context.student, context.teacher, context.trajectories, context.run
    processes = run.options.processes
    check_shares(processes, trajectories.batch_sizes(FORWARD_BATCH), what="calibration_samples")
    sites: Mapping[str, nn.Module] = teacher.family.sites(teacher.model)
    observed: Mapping[str, nn.Module] = student.layers if run.student_leads else {name: sites[name] for name in student.layers}
    tables = _ObservedTables(student, recipe, trajectories.rows, processes)
    means = {name: InputMean() for name in observed} if recipe.corrects_bias else {}
    hooks = [(observed[name], input_hook(student.layers[name], observer)) for name, observer in tables.observers.items()]
    hooks += [(observed[name], input_hook(student.layers[name], mean)) for name, mean in means.items()]
    if run.student_leads:
        hooks += [(student.layers[name], tables.set_when_reached(name)) for name in tables.observers]
    with ProgressMeter(run, "calibrate", trajectories.device) as meter:
        for done, (row, batches) in enumerate(trajectories.traverse_schedule(FORWARD_BATCH), start=1):
            tables.row = row
            with input_hooks(hooks):
                predictions = [_step(context, batch, [*tables.observers.values(), *means.values()]) for batch in batches]
            if not run.student_leads:
                tables.set_ranges(tables.observers)
            elif len(batches) > 1:  # the first batches ran with ranges that the later ones changed
                predictions = [context.prediction(student, batch) for batch in batches]
            if run.student_leads:
                for batch, prediction in zip(batches, predictions, strict=True):
                    trajectories.advance(batch, prediction)
            tables.forget()
            meter.report(done, trajectories.rows)
            if processes.any(meter.interrupted):
                raise Interrupted("Interrupted while calibrating; nothing was written. Run the same command again.")
    for name, mean in means.items():
        student.layers[name].correct_bias(mean.value(processes))
    if run.after_calibration is not None:
        run.after_calibration()


def _step(context: TrainingContext, batch: Batch, observers: Sequence[Observer | InputMean]) -> Tensor:
    """Prediction of the network that leads. The teacher's advances its samples at once, which draws their noise in the order of the batches."""
    processes, network = context.run.options.processes, context.student if context.run.student_leads else context.teacher
    if processes.size > 1:
        members = processes.members(len(batch))
        share = Share(members.start, members.stop - members.start, len(batch), 2 if batch.conditioning.guided else 1)
        for observer in observers:
            observer.share = share
    prediction = context.prediction(network, batch)
    if not context.run.student_leads:
        context.trajectories.advance(batch, prediction)
    return prediction


class _ObservedTables:
    """The observers of a student's quantizers, and the ranges that follow from what they observe.

    Args:
        student: Its tables are set.
        recipe: Computes ranges; a static one pools the observations of all rows.
        rows: Number of rows.
        processes: Those that the observations are divided among, and the search of ranges.

    Attributes:
        observers: By the name of each quantizer.
        row: The row that is being observed.
    """

    def __init__(self, student: Student, recipe: Recipe, rows: int, processes: Processes) -> None:
        self.student, self.recipe, self.rows, self.processes = student, recipe, rows, processes
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.observers = {name: Observer(self.generator) for name in student.quantizers}
        self.pooled: dict[str, ActivationSamples] = {}
        self.latest: dict[str, ActivationSamples] = {}
        self.row = 0

    def set_ranges(self, names: Iterable[str]) -> None:
        """Set the tables of some quantizers at this row, or at all rows for a static recipe, from what was observed."""
        observed = dict(merged({name: self.observers[name].samples() for name in names}, self.processes))
        if self.recipe.static:
            subsets = {name: samples.subsample(self.rows, self.generator) for name, samples in observed.items()}
            observed = {name: self.pooled[name] + subset if name in self.pooled else subset for name, subset in subsets.items()}
        self.latest |= observed
        ranges = self.processes.map(
            lambda name: [self.recipe.activation_range(observed[name], table.spec) for table in self.student.quantizers[name].tables],
            observed,
        )
        for name, found in zip(observed, ranges, strict=True):
            for table, range_ in zip(self.student.quantizers[name].tables, found, strict=True):
                table.set_row(slice(None) if self.recipe.static else self.row, range_)

    def set_when_reached(self, name: str) -> Hook:
        """A hook of the student's layer that sets its range from its own input, before the layer quantizes it."""
        return lambda layer, args: self.set_ranges([name])

    def forget(self) -> None:
        """End a row."""
        self.pooled = dict(self.latest)
        for observer in self.observers.values():
            observer.clear()


def input_hook(layer: StudentLayer, collector: Observer | InputMean) -> Hook:
    """A hook that calls `collector` on a layer's input as the student's layer quantizes it: multiplied by its pre-scale, rotated."""
    return lambda _, args: collector(layer.layer, (site_input(layer.layer, args[0]),))
