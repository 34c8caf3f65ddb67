"""Calibration: observe the input of every layer at each timestep row along sampling trajectories, and set the activation tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples
from calibration.data.trajectory_pool import FORWARD_BATCH
from calibration.observers.observers import InputMean, Observer
from calibration.recipe import Recipe, TrainingContext
from calibration.run.options import Interrupted
from calibration.run.parallel_map import parallel_map
from calibration.run.progress import ProgressMeter
from calibration.student.layers import StudentLayer
from calibration.student.module_outputs import input_hooks
from edm_deploy.network.restructure import site_input


@torch.no_grad()
def calibrate(context: TrainingContext, recipe: Recipe) -> None:
    """Set every row of every activation table of the student, and correct its biases if the recipe does so; in place.

    The teacher leads the trajectories and its layers are observed. If a pass of the run lets the student lead, each batch is first observed in the
    teacher, then the row is set, and the student, quantized at this row and at all noisier ones, takes the sampling step. The pool is left staggered
    over the schedule.

    Args:
        context: A student whose weight scales are set, the teacher, and a new pool.
        recipe: Computes ranges from observations.

    Raises:
        Interrupted: SIGINT or SIGTERM; there is no state worth saving yet.
    """
    student, teacher, trajectories, run = context.student, context.teacher, context.trajectories, context.run
    layers: Mapping[str, nn.Module] = {name: layer for name, layer in teacher.family.sites(teacher.model).items() if name in student.layers}
    generator = torch.Generator().manual_seed(recipe.seed)
    observers = {name: Observer(generator) for name in student.quantizers}
    means = {name: InputMean() for name in layers} if recipe.corrects_bias else {}
    collectors: list[tuple[str, Observer | InputMean]] = [*observers.items(), *means.items()]
    hooks = [(layers[name], _prepared(student.layers[name], collector)) for name, collector in collectors]
    specs = {name: recipe.layer_spec(name, teacher.family.placement(name)) for name in student.quantizers}
    pooled: dict[str, ActivationSamples] = {}
    with input_hooks(hooks), ProgressMeter(run, "calibrate", trajectories.device) as meter:
        for done, (row, batches) in enumerate(trajectories.traverse_schedule(FORWARD_BATCH), start=1):
            for batch in batches:
                prediction = teacher(batch.inputs)
                if not run.student_leads:
                    trajectories.advance(batch, batch.conditioning.combine(prediction))
            observed = {name: observer.pop() for name, observer in observers.items()}
            if recipe.static:
                subsets = {name: samples.subsample(trajectories.rows, generator) for name, samples in observed.items()}
                observed = pooled = {name: pooled[name] + subset for name, subset in subsets.items()} if pooled else subsets
            ranges = parallel_map(lambda name: recipe.activation_range(observed[name], specs[name]), observed)  # noqa: B023  # called at once
            for quantizer, range_ in zip(student.quantizers.values(), ranges, strict=True):
                quantizer.set_row(slice(None) if recipe.static else row, range_)
            for batch in batches if run.student_leads else ():
                trajectories.advance(batch, batch.conditioning.combine(student(batch.inputs).float()))
            meter.report(done, trajectories.rows)
            if meter.interrupted:
                raise Interrupted("Interrupted while calibrating; nothing was written. Run the same command again.")
    for name, mean in means.items():
        student.layers[name].correct_bias(mean.value())
    if run.after_calibration is not None:
        run.after_calibration()


def _prepared(layer: StudentLayer, collector: Observer | InputMean) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that calls `collector` on the input of the teacher's layer as the student's layer quantizes it: multiplied by its pre-scale, rotated."""
    return lambda teacher_layer, args: collector(teacher_layer, (site_input(layer.layer, args[0]),))
