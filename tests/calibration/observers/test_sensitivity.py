import pytest
import torch

from calibration.base_pass import PassContext
from calibration.observers.sensitivity import PredictionError, groups_to_raise, sensitivities
from calibration.recipes.mse import Mse
from calibration.student.quantization_spec import W8A8
from calibration.student.student import activations_unquantized
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


def test_each_group_is_quantized_alone_in_a_float_network(measured):
    context, _, groups, found = measured
    assert [each.sites for each in found] == groups
    # Of a site by hand: all others in floating point, its own weight rounded and its input quantized.
    site = "down_blocks.0.resnets.0.conv1"
    chosen = next(each for each in found if each.sites == (site,))
    student, error = context.student, PredictionError(context)
    with torch.no_grad():
        for name, layer in student.layers.items():
            if name != site:
                layer.rounding = torch.nn.Identity()
                layer.rounding.forward = layer.merged_weight
        quantizer = student.layers[site].quantizer
        with activations_unquantized(student):
            student.layers[site].quantizer = quantizer
            assert error() == pytest.approx(chosen.error, rel=1e-4)
    for layer in student.layers.values():
        layer.rounding = None
    # 8 bits leave next to nothing of the error of one site of 4.
    assert all(each.raised_error < 0.1 * each.error for each in found if each.error > 1e-4)
    assert all(each.gain == pytest.approx(each.error - each.raised_error) for each in found if each.error > each.raised_error)


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
