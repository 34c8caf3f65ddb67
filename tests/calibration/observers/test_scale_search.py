import pytest
import torch

from calibration.observers.scale_search import least_error_weight_scale, least_squares_range, range_between, widest_weight_scale
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.numerics.codes import dequantize_weight, quantize_weight

A4 = LayerSpec(4, 4, symmetric=False)
A8 = LayerSpec(8, 8, symmetric=True)


def error(values, chosen, spec):
    codes = (values / chosen.scale).round().clamp(chosen.qmin, chosen.qmin + spec.levels)
    return float((codes * chosen.scale - values).square().sum())


def test_an_asymmetric_range_puts_its_lowest_code_at_the_lowest_value():
    chosen = range_between(-1.0, 4.0, A4)
    assert (chosen.scale, chosen.qmin) == (pytest.approx(1 / 3), -3)


def test_eight_bit_ranges_are_symmetric_and_use_the_whole_of_int8():
    chosen = range_between(-1.0, 2.54, A8)
    assert (chosen.scale, chosen.qmin, chosen.qmin + A8.levels) == (pytest.approx(0.02), -128, 127)


def test_a_range_of_positive_values_still_holds_zero():
    assert range_between(2.0, 3.0, A4).qmin == 0


def test_a_tensor_of_zeros_gets_a_scale_above_zero():
    assert least_squares_range(torch.zeros(10), 0.0, 0.0, A4).scale > 0


def test_values_on_a_grid_are_found_without_error():
    values = torch.arange(-2.0, 14.0) * 0.25
    chosen = least_squares_range(values, -0.5, 3.25, A4)
    assert (chosen.scale, chosen.qmin) == (pytest.approx(0.25), -2)


@pytest.mark.parametrize(
    "spec", [LayerSpec(4, 3, symmetric=False), A4, LayerSpec(4, 6, symmetric=False), LayerSpec(4, 5, symmetric=True), A8]
)
def test_the_least_squares_range_is_no_worse_than_the_widest(spec):
    values = torch.nn.functional.silu(torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 2)
    low, high = float(values.min()), float(values.max())
    chosen = least_squares_range(values, low, high, spec)
    assert chosen.qmin <= 0 <= chosen.qmin + spec.levels
    assert error(values, chosen, spec) <= error(values, range_between(low, high, spec), spec) * 1.0001


def test_no_scale_on_a_fine_grid_beats_the_least_squares_range_by_much():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    chosen = least_squares_range(values, float(values.min()), float(values.max()), A4)
    grid = [type(chosen)(scale, qmin) for qmin in range(-15, 1) for scale in torch.linspace(0.05, 1.5, 300).tolist()]
    assert error(values, chosen, A4) <= min(error(values, other, A4) for other in grid) * 1.01


@pytest.mark.parametrize("spec", [A4, LayerSpec(4, 5, symmetric=True)], ids=["asymmetric", "symmetric"])
def test_clipped_values_count_as_often_as_they_are_weighted(spec):
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)).exp()

    def weighted(chosen, weight):
        outside = (values < (chosen.qmin - 0.5) * chosen.scale) | (values > (chosen.qmin + spec.levels + 0.5) * chosen.scale)
        codes = (values / chosen.scale).round().clamp(chosen.qmin, chosen.qmin + spec.levels)
        return float(((codes * chosen.scale - values).square() * torch.where(outside, weight, 1.0)).sum())

    plain, wide = (least_squares_range(values, 0.0, float(values.max()), spec, clip_weight=weight) for weight in (1.0, 4.0))
    assert wide.scale > plain.scale
    assert weighted(wide, 4.0) < weighted(plain, 4.0)
    assert weighted(plain, 1.0) < weighted(wide, 1.0)
    grid = [type(plain)(scale, wide.qmin) for scale in torch.linspace(0.05, 3, 400).tolist()]
    assert weighted(wide, 4.0) <= min(weighted(other, 4.0) for other in grid) * 1.01


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_searched_weight_scale_is_no_worse_than_the_widest(bits):
    weight = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))

    def error_of(scale):
        return (dequantize_weight(quantize_weight(weight, scale, bits), scale) - weight).abs().pow(2.4).flatten(1).sum(1)

    searched, widest = least_error_weight_scale(weight, bits), widest_weight_scale(weight, bits)
    assert bool((error_of(searched) <= error_of(widest) + 1e-6).all())


def test_a_dead_output_channel_gets_a_scale_above_zero():
    assert float(least_error_weight_scale(torch.zeros(2, 3), 4).min()) > 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "uniform"])
def test_the_quick_search_costs_at_most_two_percent_of_the_error_of_trying_everything(kind, bits):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 2900, generator=generator)
    weight = {"normal": noise, "heavy tails": noise**3, "uniform": torch.rand(64, 2900, generator=generator) - 0.5}[kind]

    def error_of(scale):
        return float((dequantize_weight(quantize_weight(weight, scale, bits), scale) - weight).abs().pow(2.4).sum())

    best = torch.full((64,), float("inf"))
    for fraction in torch.linspace(1.0, 0.2, 80):
        scale = widest_weight_scale(weight, bits) * fraction
        best = torch.minimum(best, (dequantize_weight(quantize_weight(weight, scale, bits), scale) - weight).abs().pow(2.4).sum(1))
    assert error_of(least_error_weight_scale(weight, bits)) <= float(best.sum()) * 1.02


def test_channels_are_searched_in_pieces_with_the_same_result(monkeypatch):
    weight = torch.randn(10, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = least_error_weight_scale(weight, 4)
    monkeypatch.setattr("calibration.observers.scale_search.CHUNK", 54)  # two channels
    torch.testing.assert_close(least_error_weight_scale(weight, 4), whole)


def test_weights_stored_in_float16_are_searched_in_float32():
    weight = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).half()
    assert torch.equal(least_error_weight_scale(weight, 4), least_error_weight_scale(weight.float(), 4))
    assert torch.equal(widest_weight_scale(weight, 4), widest_weight_scale(weight.float(), 4))
