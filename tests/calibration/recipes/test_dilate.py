import pytest
import torch
from torch.nn import functional

from calibration.observers.channel_scaling import scalable, stacked_weight
from calibration.observers.scale_search import widest_weight_scale
from calibration.recipes.dilate import Dilate, dilate, dilation_factors, pre_scale_of
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_context


def test_an_unsaturated_channel_is_dilated_to_the_nearest_extreme():
    weight = torch.tensor([[4.0, 1.0, -2.0], [2.0, 0.5, -3.0]])[:, :, None]
    # Channel 0 is both outputs' maximum, channel 2 their minimum; channel 1 has room for min(4 / 1, 2 / 0.5).
    assert dilation_factors(weight).tolist() == [1.0, 4.0, 1.0]


def test_both_ends_bound_the_dilation():
    weight = torch.tensor([[[4.0, 0.0], [0.0, -6.0], [1.0, -3.0], [0.0, 0.0]]])
    # Channel 2: min(4 / 1, 6 / 3). Channel 3 has no weights and stays.
    assert dilation_factors(weight).tolist() == [1.0, 1.0, 2.0, 1.0]


def test_a_pre_scale_that_float16_cannot_hold_is_rounded_up():
    factors = torch.linspace(1.0, 7.0, 101)
    scale = pre_scale_of(factors)
    assert bool((scale * factors >= 1).all())
    assert torch.equal(scale, scale.half().float())
    assert torch.allclose(scale * factors, torch.ones(101), atol=2**-9)


def test_dilation_leaves_the_float_function_and_the_weight_scales():
    student = tiny_context(Dilate()).student
    before = {name: (layer.merged_weight().clone(), layer.log_weight_scale.clone()) for name, layer in student.layers.items()}
    dilate(student)
    dilated = [name for name, layer in student.layers.items() if layer.pre_scale is not None]
    assert dilated
    for name in dilated:
        layer, (weight, log_scale) = student.layers[name], before[name]
        assert torch.equal(layer.log_weight_scale, log_scale)
        assert torch.allclose(widest_weight_scale(layer.merged_weight(), 4), widest_weight_scale(weight, 4), rtol=1e-6)
        x = torch.randn(2, weight.shape[1], *[4] * (weight.ndim - 2), generator=torch.Generator().manual_seed(0))
        scaled = x * layer.pre_scale.reshape(1, -1, *[1] * (weight.ndim - 2))
        compute = functional.linear if weight.ndim == 2 else functional.conv2d
        expected, found = compute(x.double(), weight.double()), compute(scaled.double(), layer.merged_weight().double())
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-6


def test_siblings_share_one_dilation():
    student = tiny_context(Dilate()).student
    dilate(student)
    name = next(name for name in scalable(student) if name.endswith("to_q"))
    q, k, v = (student.layers[sibling].pre_scale for sibling in student.shared_input_layers(name))
    assert (q is None) == (k is None) == (v is None)
    if q is not None:
        assert torch.equal(q, k) and torch.equal(k, v)
    assert len(dilation_factors(stacked_weight(student, name))) == student.layers[name].layer.weight.shape[1]


def test_an_unknown_partition_is_refused():
    with pytest.raises(InputError, match=r"partition is 'blok'; expected one of block"):
        Dilate(partition="blok")
