import pytest
import torch
from torch import nn

from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.artifact.reference import ROWS_SUMMED_AT_ONCE, Reference, ReferenceSite, exact_dtype
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import dequantize_weight
from tests.conftest import TINY, artifact_by_hand, tiny_inputs, tiny_model


def table(scales, qmin=-8, qmax=7, bits=4):
    rows = len(scales)
    return ActivationTable(
        bits=bits,
        scale=torch.tensor(scales),
        qmin=torch.full((rows,), qmin, dtype=torch.int8),
        qmax=torch.full((rows,), qmax, dtype=torch.int8),
    )


def test_a_linear_site_by_hand():
    # x / s = [2, -8 (clipped from -10)]; codes . weights = 2*3 + -8*1 = -2; y = 0.5 * 0.25 * -2 + 1
    site = QuantizedLayer(
        op="linear",
        codes=torch.tensor([[3, 1]], dtype=torch.int8),
        weight_scale=torch.tensor([0.25]),
        weight_bits=4,
        activation=table([0.5]),
    )
    layer = ReferenceSite(nn.Linear(2, 1), site, torch.tensor([1.0]))
    layer.rows = torch.tensor([0])
    assert layer(torch.tensor([[1.0, -5.0]])).tolist() == [[0.75]]


def test_each_sample_of_a_batch_uses_its_own_row():
    site = QuantizedLayer(
        op="linear", codes=torch.tensor([[1]], dtype=torch.int8), weight_scale=torch.ones(1), weight_bits=4, activation=table([1.0, 0.25])
    )
    layer = ReferenceSite(nn.Linear(1, 1, bias=False), site, None)
    layer.rows = torch.tensor([1, 0])
    assert layer(torch.tensor([[0.6], [0.6]])).tolist() == [[0.5], [1.0]]


def test_a_convolution_pads_with_real_zero_although_its_bounds_are_asymmetric():
    site = QuantizedLayer(
        op="conv2d",
        codes=torch.ones(1, 1, 3, 3, dtype=torch.int8),
        weight_scale=torch.ones(1),
        weight_bits=4,
        activation=table([1.0], -3, 12),
    )
    layer = ReferenceSite(nn.Conv2d(1, 1, 3, padding=1), site, torch.zeros(1))
    layer.rows = torch.tensor([0])
    assert layer(torch.ones(1, 1, 2, 2)).tolist() == [[[[4.0, 4.0], [4.0, 4.0]]]]


def test_sums_that_float32_cannot_hold_are_carried_in_float64():
    # 2^24 + 1 is the first integer that float32 lacks: 127 * 127 * 1041 + 8 = 16,790,297 > 2^24.
    site = QuantizedLayer(
        op="linear",
        codes=torch.full((1, 1042), 127, dtype=torch.int8),
        weight_scale=torch.ones(1),
        weight_bits=8,
        activation=table([1.0], -128, 127, 8),
    )
    assert exact_dtype(site.activation, site.codes) == torch.float64
    assert exact_dtype(table([1.0]), torch.full((1, 1042), 7, dtype=torch.int8)) == torch.float32
    light = torch.zeros(2 * ROWS_SUMMED_AT_ONCE, 1042, dtype=torch.int8)
    assert exact_dtype(site.activation, torch.cat([light, -site.codes])) == torch.float64, "the last of many rows counts too"


@pytest.mark.parametrize("kind", TINY)
def test_at_eight_bits_the_reference_is_close_to_the_float_model(kind):
    family, _, model = tiny_model(kind)
    inputs = tiny_inputs(kind)
    expected = family.forward(model, inputs)
    error = (Reference(artifact_by_hand(kind, 8, 8))(inputs) - expected).pow(2).mean() / expected.pow(2).mean()
    # Uniform rounding at 8 bits is about 40 dB a layer; some twenty layers in a row cost 13 dB of it.
    assert float(error) < 2e-3


def test_a_batch_of_mixed_timesteps_equals_its_samples_one_by_one(artifact_w4a4):
    """At every site, from the same input: between the sites float layers may sum in another order for another batch size."""
    reference = Reference(artifact_w4a4)
    inputs = tiny_inputs("unet2d", batch=4)
    together = reference.record(inputs)
    for k in range(4):
        alone = reference.at_sites({name: record.x[k : k + 1] for name, record in together.items()}, inputs["timestep"][k : k + 1])
        for name, record in together.items():
            assert torch.equal(alone[name].codes, record.codes[k : k + 1]), name
            assert torch.equal(alone[name].y, record.y[k : k + 1]), name  # sums of integers are exact in any order


def test_a_record_holds_what_each_site_saw(artifact_w4a4):
    reference = Reference(artifact_w4a4)
    records = reference.record(tiny_inputs("unet2d"))
    assert set(records) == set(artifact_w4a4.sites)
    for name, record in records.items():
        site = artifact_w4a4.sites[name]
        assert int(record.codes.min()) >= int(site.activation.qmin.min())
        assert int(record.codes.max()) <= int(site.activation.qmax.max())
    assert all(layer.record is None for layer in reference.sites.values())


def test_a_weight_only_site_multiplies_by_the_dequantized_weight():
    artifact = artifact_by_hand(act_bits=16)
    name = "down_blocks.0.resnets.0.conv1"
    record = Reference(artifact).record(tiny_inputs("unet2d"))[name]
    site = artifact.sites[name]
    weight = dequantize_weight(site.codes, site.weight_scale)
    expected = torch.nn.functional.conv2d(record.x, weight, artifact.params[f"{name}.bias"], padding=1)
    assert torch.allclose(record.y, expected, atol=1e-5)
