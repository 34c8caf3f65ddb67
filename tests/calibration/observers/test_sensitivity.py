import pytest
import torch

from calibration.base_pass import PassContext
from calibration.observers.sensitivity import PredictionError, groups_to_raise, raised, sensitivities
from calibration.recipes.mse import Mse
from calibration.student.quantization_spec import W8A8
from edm_deploy.pipelines.guidance import Conditioner
from tests.calibration.tiny import CPU, tiny_context, tiny_source

RECIPE = Mse(weight_bits=4, act_bits=4, rows=3)


def pass_context(kind="unet2d"):
    source = tiny_source(kind)
    return PassContext(source=source, recipe=RECIPE, conditioner=Conditioner(source.family_object, source.config), device=CPU)


def specs_of(context):
    family = context.source.family_object
    return {name: RECIPE.layer_spec(name, family.placement(name)) for name in family.sites(context.source.model)}


def test_sites_that_read_one_tensor_are_one_group_and_8_bit_sites_are_in_none():
    context = pass_context("dit")
    specs = specs_of(context)
    groups = groups_to_raise(context, specs)
    attention = "transformer_blocks.0.attn1"
    assert (f"{attention}.to_q", f"{attention}.to_k", f"{attention}.to_v") in groups
    assert sorted(name for group in groups for name in group) == sorted(name for name, spec in specs.items() if spec != W8A8)
    assert groups_to_raise(context, dict.fromkeys(specs, W8A8)) == []


@pytest.fixture(scope="module")
def measured():
    context = tiny_context(RECIPE, samples=6)
    before = {name: (layer.layer.bias, layer.quantizer) for name, layer in context.student.layers.items()}
    groups = groups_to_raise(pass_context(), specs_of(pass_context()))
    return context, before, groups, sensitivities(context, RECIPE, groups, weights_too=True)


def test_each_group_is_raised_alone(measured):
    context, _, groups, found = measured
    student, error = context.student, PredictionError(context)
    assert [each.sites for each in found] == groups
    assert {each.error for each in found} == {error()}  # as before, to the last bit
    site = "up_blocks.0.resnets.0.conv1"
    by_hand = next(each for each in found if each.sites == (site,))
    layer = student.layers[site]
    quantizer, scale = layer.quantizer, layer.log_weight_scale
    layer.quantizer, layer.bits = quantizer.relaxed, 8
    layer.log_weight_scale = torch.nn.Parameter(RECIPE.weight_scale(layer.merged_weight(), 8).log())
    assert error() == by_hand.raised_error != by_hand.error
    layer.quantizer, layer.bits, layer.log_weight_scale = quantizer, 4, scale
    assert any(each.gain > 0 for each in found)
    assert all(each.gain == max(each.error - each.raised_error, 0.0) for each in found)


def test_with_every_group_raised_next_to_nothing_of_the_error_is_left(measured):
    context, _, groups, found = measured
    with raised([context.student.layers[site] for group in groups for site in group], RECIPE, weights_too=True):
        assert PredictionError(context)() < 0.05 * found[0].error


def test_the_student_is_left_at_its_own_bits(measured):
    context, before, _, _ = measured
    for name, layer in context.student.layers.items():
        assert layer.layer.bias is before[name][0] and layer.quantizer is before[name][1] and layer.rounding is None
        assert layer.bits == context.student.specs[name].weight_bits


def test_rows_are_weighted(measured):
    context, _, _, _ = measured
    first, second, third, whole = (PredictionError(context, weights)() for weights in [*torch.eye(3), torch.ones(3)])
    assert min(first, second, third) > 0
    assert whole == pytest.approx(first + second + third)
