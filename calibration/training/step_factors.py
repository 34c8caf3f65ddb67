"""Weights of the sampling steps in a training's loss, from what an error at each step does to the final sample."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.recipe import TrainingContext
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.pipelines.step_weights import cached_step_weights


def step_factors(context: TrainingContext, power: float) -> Tensor:
    """`step_weights` of the teacher to a power, scaled to a mean of 1: float32 [R], in sampling order.

    Args:
        context: The teacher in float32, and the schedule and conditioning of the trajectories.
        power: 0 weights all steps alike, 1 by their whole effect.
    """
    teacher, trajectories = context.teacher, context.trajectories
    if power == 0:
        return torch.ones(trajectories.rows)
    digest = str(context.run.identity["teacher"])
    weights = cached_step_weights(
        teacher.model, teacher, trajectories.schedule, trajectories.conditioner, digest=digest, device=trajectories.device
    ).pow(power)
    return weights / weights.mean()


def shared_step_factors(context: TrainingContext, power: float) -> Tensor:
    """`step_factors`, computed by process 0 for all of them; of a resumed run 1, because its checkpoint has those of its start."""
    processes, resumed = context.run.options.processes, context.run.options.resume
    factors = processes.first(step_factors(context, 0.0 if resumed else power) if processes.writes else None)
    assert factors is not None  # process 0 computed them
    return factors


def row_factors(context: TrainingContext, factors: Tensor) -> Tensor:
    """The factors of sampling steps, by row of the student's tables: float32 [R], the mean of the steps that use the row, 1 where none does."""
    rows = table_rows(context.student.row_of_timestep, context.trajectories.schedule.timesteps).cpu()
    count = len(context.student.timesteps)
    steps, sums = torch.bincount(rows, minlength=count), torch.bincount(rows, weights=factors.cpu().double(), minlength=count)
    return torch.where(steps > 0, sums / steps.clamp(min=1), 1.0).float()
