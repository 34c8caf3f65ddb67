import torch

from calibration.observers.gptq import gptq
from edm_deploy.numerics.codes import dequantize_weight, quantize_weight, weight_bounds


def problem(seed=0, outputs=12, inputs=160):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(2000, inputs, generator=generator) @ mixing
    weight = torch.randn(outputs, inputs, generator=generator)
    scale = weight.abs().amax(1) / 7
    return weight, scale, x.T @ x / len(x)


def error(codes, weight, scale, moments):
    left = dequantize_weight(codes, scale) - weight
    return float((left @ moments * left).sum())


def test_the_output_s_error_is_less_than_that_of_nearest_rounding():
    weight, scale, moments = problem()
    codes = gptq(weight, scale, 4, moments)
    assert codes.dtype == torch.int8 and int(codes.min()) >= -8 and int(codes.max()) <= 7
    assert error(codes, weight, scale, moments) < 0.6 * error(quantize_weight(weight, scale, 4), weight, scale, moments)


def test_independent_inputs_are_rounded_to_nearest():
    weight, scale, _ = problem()
    codes = gptq(weight, scale, 3, torch.diag(torch.linspace(0.5, 2, 160)), damping=0.0)
    assert torch.equal(codes, quantize_weight(weight, scale, 3))


def test_one_weight_compensates_the_other_where_both_have_the_same_input():
    codes = gptq(torch.tensor([[0.4, 0.4]]), torch.ones(1), 4, torch.ones(2, 2), damping=1e-4)
    assert sorted(codes[0].tolist()) == [0, 1], "their sum is 0.8"


def test_inputs_that_are_always_zero_do_no_harm():
    weight, scale, moments = problem()
    moments[:, :40] = moments[:40] = 0
    for singular in (moments, torch.zeros_like(moments)):
        codes = gptq(weight, scale, 4, singular)
        assert int(codes.abs().max()) <= max(map(abs, weight_bounds(4)))
        assert torch.equal(codes[:, :40], quantize_weight(weight, scale, 4)[:, :40])
