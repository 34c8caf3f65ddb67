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


def row_factors(context: TrainingContext, factors: Tensor) -> Tensor:
    """The factors of sampling steps, float32 [R], by the row of the student's tables that each step uses."""
    rows = table_rows(context.student.row_of_timestep, context.trajectories.schedule.timesteps)
    return torch.ones(len(context.student.timesteps)).index_copy(0, rows.cpu(), factors.cpu())
