import pytest
import torch
from torch import nn

from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.training.trainable_weights import detach_bias, detach_weight, mean_scale


def layer(bias=True):
    made = StudentLayer(nn.Linear(2, 3, bias=bias), LayerSpec(4, None, True), None)
    made.set_weight_scale(torch.tensor([0.1, 0.2, 0.3]))
    return made


def test_a_detached_weight_does_not_affect_the_teachers():
    student = layer()
    before = student.layer.weight
    with torch.no_grad():
        detach_weight(student).add_(1.0)
        detach_bias(student).add_(1.0)
    assert student.layer.weight is not before
    assert torch.equal(student.layer.weight, before + 1)


def test_a_layer_without_a_bias_has_none_to_detach():
    assert detach_bias(layer(bias=False)) is None


def test_the_mean_scale_is_over_output_channels():
    assert mean_scale(layer()) == pytest.approx(0.2)
