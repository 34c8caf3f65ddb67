import torch
from torch import nn

from calibration.reconstruction.block_optimizers import LearnWeights
from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.training.trainable_weights import detach_bias, detach_weight, mean_scale


def layer(bias=True):
    made = StudentLayer(nn.Linear(2, 3, bias=bias), LayerSpec(4, None, True), None)
    made.set_weight_scale(torch.tensor([0.1, 0.2, 0.3]))
    return made


def test_a_weight_of_its_own_leaves_the_teachers_as_it_was():
    student = layer()
    before = student.layer.weight
    with torch.no_grad():
        detach_weight(student).add_(1.0)
        detach_bias(student).add_(1.0)
    assert student.layer.weight is not before
    assert torch.equal(student.layer.weight, before + 1)


def test_a_layer_without_a_bias_has_none_of_its_own():
    assert detach_bias(layer(bias=False)) is None


def test_rates_are_in_steps_of_the_layers_codes():
    student = layer()
    weights, scales = LearnWeights(travel=5.0, scale_travel=0.5).begin([student], [])
    assert abs(mean_scale(student) - 0.2) < 1e-6
    assert abs(weights.rate - 1.0) < 1e-6
    assert (weights.parameters[0] is student.layer.weight, scales.rate) == (True, 0.5)


def test_the_rates_fall_to_zero_and_nothing_is_penalized():
    learner = LearnWeights(travel=1.0, scale_travel=1.0)
    assert [learner.factor(share) for share in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert learner.penalty(0.5) is None
