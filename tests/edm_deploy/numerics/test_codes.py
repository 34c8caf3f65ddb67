import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import dequantize_weight, fits_int4, pack_int4, quantize_weight, symmetric_bounds, unpack_int4, weight_bounds


def test_the_first_code_is_in_the_low_nibble():
    assert pack_int4(torch.tensor([1, -2], dtype=torch.int8)).tolist() == [0xE1]


def test_an_odd_tail_is_padded_with_a_zero_nibble():
    assert pack_int4(torch.tensor([-1, 0, 7], dtype=torch.int8)).tolist() == [0x0F, 0x07]


@given(st.lists(st.integers(-8, 7), min_size=0, max_size=33))
def test_unpack_undoes_pack(codes):
    tensor = torch.tensor(codes, dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(tensor), (len(codes),)), tensor)


def test_packing_agrees_with_onnx():
    ir = pytest.importorskip("onnx_ir")
    codes = torch.tensor([[3, -8, 7], [0, -1, 5]], dtype=torch.int8)
    tensor = ir.PackedTensor(pack_int4(codes).numpy(), dtype=ir.DataType.INT4, shape=ir.Shape([2, 3]), name="codes")
    assert tensor.numpy().astype("int8").tolist() == codes.tolist()


def test_codes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[-9, 3\] do not fit"):
        pack_int4(torch.tensor([-9, 3], dtype=torch.int8))
    assert not fits_int4(torch.tensor([8], dtype=torch.int8))


def test_unpack_refuses_a_wrong_length():
    with pytest.raises(ValueError, match="2 bytes hold 4 codes"):
        unpack_int4(torch.zeros(2, dtype=torch.uint8), (5,))


@pytest.mark.parametrize(("bits", "bounds"), [(2, (-2, 1)), (4, (-8, 7)), (7, (-64, 63)), (8, (-127, 127))])
def test_weight_bounds_are_twos_complement_and_symmetric_at_eight(bits, bounds):
    assert weight_bounds(bits) == bounds


@pytest.mark.parametrize(("bits", "bounds"), [(3, (-3, 3)), (4, (-7, 7)), (8, (-127, 127))])
def test_symmetric_activation_bounds_leave_out_the_smallest_code(bits, bounds):
    assert symmetric_bounds(bits) == bounds


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_weight_bits_out_of_range_are_refused(bits):
    with pytest.raises(InputError, match=rf"weight bits {bits}: expected 2 to 8"):
        weight_bounds(bits)


@pytest.mark.parametrize("bits", [2, 9])
def test_activation_bits_out_of_range_are_refused(bits):
    with pytest.raises(InputError, match=rf"activation bits {bits}: expected 3 to 8"):
        symmetric_bounds(bits)


def test_weights_round_half_to_even_and_saturate():
    weight = torch.tensor([[0.5, 1.5, 2.5, 100.0, -100.0]])
    assert quantize_weight(weight, torch.ones(1), 4).tolist() == [[0, 2, 2, 7, -8]]


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_come_back_as_the_nearest_multiple_of_the_scale(bits):
    weight = torch.randn(5, 7, 3, 3, generator=torch.Generator().manual_seed(bits))
    scale = weight.flatten(1).abs().amax(1) / weight_bounds(bits)[1]
    codes = quantize_weight(weight, scale, bits)
    # half a step, and float32 rounding of a quotient of at most 127
    assert bool(((dequantize_weight(codes, scale) - weight).abs() <= scale.reshape(-1, 1, 1, 1) * (0.5 + 1e-5)).all())
