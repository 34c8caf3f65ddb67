import pytest
import torch

from calibration.recipes.mse import Mse
from calibration.reconstruction.block_optimizers import ActivationScaleOptimizer, RoundingOptimizer, WeightOptimizer, quantizers_inside
from tests.calibration.tiny import tiny_source

TIMESTEPS = torch.tensor([0, 500], dtype=torch.int32)


def student_of(kind="unet2d", **settings):
    return Mse(**{"weight_bits": 4, "act_bits": 4} | settings).student(tiny_source(kind), TIMESTEPS, torch.device("cpu"))


def test_rates_of_scales_decrease_as_half_a_cosine():
    assert [ActivationScaleOptimizer(step_length=1.0).factor(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("static", [False, True])
def test_static_rows_have_one_gradient(static):
    student = student_of()
    layer = student.layers["mid_block.resnets.0.conv1"]
    quantizer = layer.quantizer
    learner = ActivationScaleOptimizer(step_length=0.1, bound_step_length=1.0, static=static)
    groups = learner.begin([layer], [quantizer])
    assert [group.rate for group in groups] == [0.1, 1.0]
    quantizer.rows = torch.tensor([1, 1])  # no sample has row 0
    quantizer(torch.linspace(-9, 9, 32).reshape(2, 16)).square().sum().backward()
    rows = quantizer.log_scale.grad
    assert float(rows[1]) != 0
    assert float(rows[0]) == (float(rows[1]) if static else 0.0)
    learner.end([layer])
    assert learner.penalty(0.5) is None


def test_fixed_bounds_are_not_learned():
    student = student_of(act_bits=8)
    layer = student.layers["conv_in"]
    (group,) = ActivationScaleOptimizer(step_length=1.0, bound_step_length=1.0).begin([layer], [layer.quantizer])
    assert list(group.parameters) == [layer.quantizer.log_scale]


def test_rounding_starts_from_the_float_weights_each_time():
    student = student_of(weight_bits=2)
    layer = student.layers["mid_block.resnets.0.conv1"]
    learner, weight = RoundingOptimizer(student, step_length=20.0, weight=0.01), layer.layer.weight
    for _ in range(2):
        (group,) = learner.begin([layer], [])
        assert layer.layer.weight is weight
        assert learner.penalty(0.1) is None
        # 0.01 a weight at the most, and less where one has nearly decided
        assert 0 < float(learner.penalty(0.9).detach()) <= 0.01 * weight.numel()
        with torch.no_grad():
            group.parameters[0].neg_()
        learner.end([layer])
        assert layer.rounding is None
        assert layer.layer.weight is not weight


def test_a_quantizer_shared_by_several_blocks_is_inside_none():
    student = student_of("unet2d-condition")
    block = [name for name in student.layers if name.startswith("mid_block.attentions.0.transformer_blocks.0.")]
    inside = quantizers_inside(student, block)
    text = student.layers["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"].quantizer
    assert all(quantizer is not text for quantizer in inside)
    assert any(quantizer is student.layers["mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].quantizer for quantizer in inside)
    assert quantizers_inside(student, list(student.layers)) == list(student.quantizers.values())


def test_rates_of_weights_are_in_steps_of_the_layers_codes():
    layer = student_of().layers["conv_in"]
    layer.set_weight_scale(torch.linspace(0.1, 0.3, len(layer.log_weight_scale)))  # mean 0.2
    weights, scales = WeightOptimizer(step_length=5.0, scale_step_length=0.5).begin([layer], [])
    assert weights.rate == pytest.approx(1.0)
    assert (weights.parameters[0] is layer.layer.weight, scales.rate) == (True, 0.5)


def test_rates_of_weights_decrease_linearly_and_nothing_is_penalized():
    learner = WeightOptimizer(step_length=1.0, scale_step_length=1.0)
    assert [learner.factor(share) for share in (0.0, 0.25, 1.0)] == [1.0, 0.75, 0.0]
    assert learner.penalty(0.5) is None
