import pytest
import torch

from calibration.student.fake_quant import fake_quantize, round_straight_through


def one(x, scale=0.5, qmin=-1.0, levels=3):
    """Value and gradients of one sample with bounds [-1, 2]; the result is weighted by 1, 10, 100, ... so that the values can be distinguished."""
    tensors = torch.tensor([x], requires_grad=True), torch.tensor([scale], requires_grad=True), torch.tensor([qmin], requires_grad=True)
    y = fake_quantize(*tensors, levels)
    (y * 10.0 ** torch.arange(len(x))).sum().backward()
    return [y[0].tolist()] + [tensor.grad.flatten().tolist() for tensor in tensors]


def test_values_land_on_codes_between_the_bounds():
    y, _, _, _ = one([0.3, 0.7, 5.0, -5.0])
    assert y == [0.5, 0.5, 1.0, -0.5]


def test_the_gradient_of_x_stops_outside_the_bounds():
    _, x, _, _ = one([0.3, 0.7, 5.0, -5.0])
    assert x == [1.0, 10.0, 0.0, 0.0]


def test_the_gradient_of_the_scale_is_the_rounding_error_within_and_the_bound_outside():
    _, _, scale, _ = one([0.3, 0.7, 5.0, -5.0])
    # u = 0.6 and 1.4, both round to 1; outside the codes are 2 and -1.
    assert scale == [pytest.approx(0.4 - 10 * 0.4 + 100 * 2 - 1000 * 1, rel=1e-5)]


def test_the_gradient_of_the_lowest_code_is_the_scale_outside_and_nothing_within():
    _, _, _, qmin = one([0.3, 0.7, 5.0, -5.0])
    assert qmin == [pytest.approx(0.5 * 1100)]


def test_a_value_in_the_last_half_step_before_a_bound_still_has_a_gradient():
    _, x, _, _ = one([1.2, -0.7, 1.3, -0.8])  # u = 2.4, -1.4 within; 2.6, -1.6 outside
    assert x == [1.0, 10.0, 0.0, 0.0]


def test_each_sample_has_its_own_scale_and_bounds():
    x = torch.full((2, 1, 1, 1), 3.0)
    y = fake_quantize(x, torch.tensor([1.0, 0.5]), torch.tensor([0.0, -8.0]), 7)
    assert y.flatten().tolist() == [3.0, -0.5]


def test_bfloat16_inputs_get_the_codes_of_float32():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, qmin = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([-3.0, -5.0, -8.0, 0.0])
    low = fake_quantize(x, scale, qmin, 15).float() / scale[:, None]
    full = fake_quantize(x.float(), scale, qmin, 15) / scale[:, None]
    assert torch.equal(low.round(), full.round())


def test_gradients_agree_with_those_of_a_chain_of_elementary_operations():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, 4, 4, generator=generator)
    weights = torch.randn(3, 5, 4, 4, generator=generator)
    scale, qmin = torch.tensor([0.2, 0.1, 0.3]), torch.tensor([-4.0, -7.0, -1.0])

    def gradients(function):
        tensors = [value.clone().requires_grad_() for value in (x, scale, qmin)]
        (function(*tensors) * weights).sum().backward()
        return [tensor.grad for tensor in tensors]

    def chain(x, scale, qmin):
        s, low = scale.view(-1, 1, 1, 1), qmin.view(-1, 1, 1, 1)
        codes = round_straight_through(x / s)
        return torch.clamp(codes, low, low + 15) * s

    for ours, theirs in zip(gradients(lambda *t: fake_quantize(*t, 15)), gradients(chain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)  # sums of 80 float32 terms in another order


def test_rounding_is_half_to_even_with_the_gradient_of_the_identity():
    x = torch.tensor([0.5, 1.5, -0.7], requires_grad=True)
    y = round_straight_through(x)
    y.sum().backward()
    assert y.tolist() == [0.0, 2.0, -1.0]
    assert x.grad.tolist() == [1.0, 1.0, 1.0]
