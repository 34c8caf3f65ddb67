import math

import torch
from torch import nn

from calibration.student.layers import ActivationQuantizer, StudentLayer
from calibration.student.quantization_spec import LayerSpec, QuantRange

A4 = LayerSpec(4, 4, symmetric=False)


def quantizer(rows=2, spec=A4):
    made = ActivationQuantizer(spec, rows)
    made.set_row(0, QuantRange(0.5, -3))
    made.set_row(1, QuantRange(0.25, 0))
    made.rows = torch.tensor([0, 1])
    return made


def test_each_sample_is_rounded_by_its_own_row():
    x = torch.tensor([[1.1, -9.0], [1.1, -9.0]])
    assert quantizer()(x).tolist() == [[1.0, -1.5], [1.0, 0.0]]


def test_the_table_has_integer_bounds_and_is_valid_for_any_trained_values():
    made = quantizer()
    with torch.no_grad():
        made.qmin.copy_(torch.tensor([-3.4, 7.0]))
        made.log_scale[1] = -40.0
    table = made.table()
    assert table.qmin.tolist() == [-3, 0]
    assert table.qmax.tolist() == [12, 15]
    assert table.problem(2) is None


def test_a_learned_lowest_code_is_an_integer_while_training():
    made = quantizer()
    with torch.no_grad():
        made.qmin.copy_(torch.tensor([-2.6, -0.4]))
    assert made(torch.tensor([[-9.0], [-9.0]])).tolist() == [[-1.5], [0.0]]


def test_every_row_of_a_mixed_batch_gets_a_gradient_and_no_other():
    made = ActivationQuantizer(A4, 3)
    made.rows = torch.tensor([0, 2])
    made(torch.full((2, 4), 30.0)).sum().backward()
    assert made.log_scale.grad.ne(0).tolist() == [True, False, True]
    # 30 is above the bounds [0, 15]: both bounds' gradients are the scale, once for each of 4 values.
    assert made.qmin.grad.tolist() == [4.0, 0.0, 4.0]


def test_eight_bit_bounds_are_fixed_and_not_learned():
    made = ActivationQuantizer(LayerSpec(8, 8, symmetric=True), 2)
    assert not made.qmin.requires_grad
    assert (made.table().qmin.tolist(), made.table().qmax.tolist()) == ([-128, -128], [127, 127])


def test_layers_that_receive_the_same_tensor_share_one_result():
    made, x = quantizer(), torch.randn(2, 3)
    assert made(x) is made(x)
    assert made(x) is not made(x.clone())


def test_the_update_starts_at_zero_and_is_merged_before_rounding():
    layer = StudentLayer(nn.Linear(2, 1, bias=False).requires_grad_(False), A4, None)
    layer.layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
    layer.set_weight_scale(torch.tensor([1.0]))
    layer.add_update(1, torch.Generator().manual_seed(0))
    assert layer.codes()[0].tolist() == [[1, 2]]
    with torch.no_grad():
        layer.lora_a.copy_(torch.tensor([[1.0, 1.0]]))
        layer.lora_b.fill_(0.3)
    # 1.3 -> 1, 2.3 -> 2: rounded after the sum, so an update below half a step leaves no trace.
    assert layer(torch.tensor([[1.0, 1.0]])).item() == 3.0
    with torch.no_grad():
        layer.lora_b.fill_(0.6)
    assert layer(torch.tensor([[1.0, 1.0]])).item() == 5.0
    assert layer.codes()[0].tolist() == [[2, 3]]


def test_the_update_of_a_convolution_has_the_kernel_of_its_weight():
    layer = StudentLayer(nn.Conv2d(4, 6, 3, padding=1).requires_grad_(False), A4, None)
    layer.add_update(32, torch.Generator().manual_seed(0))
    assert tuple(layer.lora_a.shape) == (6, 36)  # rank no larger than the matrix allows
    assert layer.merged_weight().shape == layer.layer.weight.shape
    assert float(layer.lora_a.detach().abs().max()) <= 1 / math.sqrt(36)


def test_autocast_computes_in_bfloat16_and_rounds_in_float32():
    layer = StudentLayer(nn.Linear(8, 4).requires_grad_(False), A4, quantizer())
    layer.set_weight_scale(torch.full((4,), 0.1))
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    layer.quantizer.clear_cache()
    torch.testing.assert_close(low.float(), layer(x.float()), rtol=0.02, atol=0.02)  # bfloat16 keeps 8 bits of each product and of the sum


def test_bias_correction_restores_the_mean_output():
    layer = StudentLayer(nn.Linear(2, 1).requires_grad_(False), A4, None)
    layer.layer.weight.copy_(torch.tensor([[1.25, 2.0]]))
    layer.layer.bias.fill_(1.0)
    layer.set_weight_scale(torch.tensor([1.0]))
    layer.correct_bias(torch.tensor([4.0, 9.0]))  # rounding took 0.25 from the first weight: 0.25 * 4
    assert layer.layer.bias.item() == 2.0


def test_bias_correction_restores_the_mean_output_of_a_grouped_convolution():
    generator = torch.Generator().manual_seed(0)
    float_layer = nn.Conv2d(4, 6, 3, groups=2).requires_grad_(False)
    float_layer.weight.copy_(torch.randn(float_layer.weight.shape, generator=generator))
    x = torch.randn(1, 4, 1, 1, generator=generator).expand(1, 4, 5, 5).contiguous()  # constant per channel: the correction is exact
    expected = float_layer(x)
    layer = StudentLayer(float_layer, A4, None)
    layer.set_weight_scale(torch.full((6,), 0.5))
    layer.correct_bias(x.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
