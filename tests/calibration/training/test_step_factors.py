from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from calibration.recipes.minmax import MinMax
from calibration.training import step_factors
from calibration.training.distillation import Training, TrainingSchedule
from calibration.training.param_group import ParamGroup
from edm_deploy.pipelines.step_weights import cached_step_weights
from tests.calibration.tiny import tiny_context


@pytest.fixture
def context():
    context = tiny_context(MinMax(rows=4, weight_bits=4, act_bits=4))
    return replace(context, run=replace(context.run, identity={"teacher": "tiny"}))


def test_a_power_of_0_weights_all_steps_alike(context):
    assert step_factors.step_factors(context, 0.0).tolist() == [1.0] * 4


def test_factors_are_the_weights_to_a_power_with_a_mean_of_1(context):
    trajectories = context.trajectories
    weights = cached_step_weights(
        context.teacher.model, context.teacher, trajectories.schedule, trajectories.conditioner, digest="tiny", device=trajectories.device
    )
    assert len(set(weights.tolist())) == 4
    torch.testing.assert_close(step_factors.step_factors(context, 0.5), weights.sqrt() / weights.sqrt().mean())


def test_rows_have_the_factors_of_the_steps_that_use_them(context):
    steps = context.trajectories.schedule.timesteps
    assert steps[0] > steps[-1]  # sampling begins at the last row
    found = step_factors.row_factors(context, torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert found.tolist() == [1.0, 2.0, 3.0, 4.0]
    rows = torch.tensor([0, 0, 2, 2])[context.student.row_of_timestep.long()]  # as where an artifact shares rows
    context.student.row_of_timestep = rows.to(torch.int32)
    assert step_factors.row_factors(context, torch.tensor([4.0, 3.0, 2.0, 1.0])).tolist() == [1.5, 1.0, 3.5, 1.0]


def test_each_sample_of_a_batch_is_weighted_by_its_own_step(context):
    context.trajectories.position = torch.tensor([0, 1, 2, 3])
    quantizer = next(iter(context.student.quantizers.values()))
    losses = []
    for factors in ([1.0, 1.0, 1.0, 1.0], [4.0, 0.0, 0.0, 0.0], [0.0, 4.0, 4.0, 4.0]):
        training = Training(
            context, [ParamGroup([quantizer.log_scale], 1e-9)], TrainingSchedule(steps=4, batch=4), (), torch.tensor(factors)
        )
        state = {name: value.clone() for name, value in context.trajectories.state().items()}
        losses.append(training.step(0.0))
        context.trajectories.load_state(state)
    assert losses[1] + losses[2] == pytest.approx(4 * losses[0], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-3)
