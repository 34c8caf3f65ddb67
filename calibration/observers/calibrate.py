"""Calibration: observe every layer's input at each timestep row, along trajectories, and set the tables."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples
from calibration.data.trajectory_pool import Trajectories
from calibration.observers.observers import InputMean, Observer
from calibration.recipe import Recipe
from calibration.run.memory import peak_memory
from calibration.run.options import Interrupted, Progress, Run
from calibration.run.parallel_map import each_in_a_thread
from calibration.run.sigint import InterruptFlag
from calibration.student.layers import StudentLayer
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.network.restructure import scaled_input

BATCH = 32


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
    specs = {name: recipe.layer_spec(name, teacher.family.placement(name)) for name in student.quantizers}
    pooled: dict[str, ActivationSamples] = {}
    start = time.perf_counter()
    try:
        with InterruptFlag() as interrupt:
            for done, (row, batches) in enumerate(trajectories.sweep(BATCH), start=1):
                for batch in batches:
                    prediction = teacher(batch.inputs)
                    if not run.student_leads:
                        trajectories.advance(batch, batch.conditioning.combine(prediction))
                seen = {name: observer.take() for name, observer in observers.items()}
                if recipe.static:
                    thinned = {name: observation.thinned(trajectories.rows, generator) for name, observation in seen.items()}
                    seen = pooled = {name: pooled[name] + one for name, one in thinned.items()} if pooled else thinned
                ranges = each_in_a_thread(lambda name: recipe.activation_range(seen[name], specs[name]), seen)  # noqa: B023  # run at once
                for quantizer, range_ in zip(student.quantizers.values(), ranges, strict=True):
                    quantizer.set_row(slice(None) if recipe.static else row, range_)
                for batch in batches if run.student_leads else ():
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
    if run.after_calibration is not None:
        run.after_calibration()
