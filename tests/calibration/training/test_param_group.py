import torch

from calibration.recipes.minmax import MinMax
from calibration.training.distillation import Training, TrainingSchedule
from calibration.training.param_group import ParamGroup
from tests.calibration.tiny import tiny_context


def test_a_group_of_rate_zero_is_not_trained():
    context = tiny_context(MinMax(rows=2, weight_bits=4, act_bits=4))
    layer = context.student.layers["conv_in"]
    groups = [ParamGroup([layer.log_weight_scale], 0.0), ParamGroup([layer.quantizer.log_scale], 0.1)]
    training = Training(context, groups, TrainingSchedule(steps=4, batch=2))
    before = layer.log_weight_scale.clone(), layer.quantizer.log_scale.clone()
    training.step(0.0)
    assert list(training.trained.values()) == [layer.quantizer.log_scale]
    assert torch.equal(layer.log_weight_scale, before[0])
    # All samples of a new pool are at the noisiest timestep, the last row. The first step of Adam has the length of the rate.
    moved = (layer.quantizer.log_scale - before[1]).abs().detach()
    torch.testing.assert_close(moved, torch.tensor([0.0, 0.1]), rtol=1e-3, atol=0)
