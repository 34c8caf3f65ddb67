"""Layouts by numbers that can be checked by hand, then round trips."""

import pytest
import torch

from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import pack_int4
from edm_deploy.numerics.kernel_layout import CHUNK, bits_of, code_bytes, pack_codes, pack_weight, unpack_codes, weight_sum, zero_codes
from edm_deploy.runtime.capabilities import code_format


def site(weight: list[int], bounds: list[tuple[int, int]], bits: int = 4) -> QuantizedLayer:
    qmin, qmax = torch.tensor(bounds, dtype=torch.int8).T
    table = ActivationTable(bits=bits, scale=torch.ones(len(bounds)), qmin=qmin, qmax=qmax)
    codes = torch.tensor([weight], dtype=torch.int8)
    return QuantizedLayer(op="linear", codes=codes, weight_scale=torch.ones(1), weight_bits=bits, activation=table)


def random_codes(*shape: int, low: int = -8, high: int = 7) -> torch.Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(0))


def test_a_pixel_takes_whole_chunks():
    assert [code_bytes(channels, 4) for channels in (1, 31, 32, 33, 320)] == [16, 16, 16, 32, 160]
    assert [code_bytes(channels, 8) for channels in (1, 16, 17, 320)] == [16, 16, 32, 320]


def test_the_even_channel_is_in_the_low_nibble():
    assert pack_codes(torch.tensor([[1, -2, 3]]), 4).tolist() == [[0xE1, 0x03] + [0] * 14]


def test_an_unsigned_code_uses_all_sixteen_values():
    assert pack_codes(torch.tensor([[15, 8]]), 4)[0, 0].item() == 0x8F
    assert unpack_codes(pack_codes(torch.tensor([[15, 8]]), 4), 4, unsigned=True, channels=2).tolist() == [[15, 8]]


def test_eight_bits_are_stored_as_they_are():
    assert pack_codes(torch.tensor([[-1, 127, -128]]), 8).tolist() == [[255, 127, 128] + [0] * 13]


def test_a_weight_is_stored_by_output_tap_and_channel():
    codes = torch.arange(8).reshape(1, 2, 2, 2).to(torch.int8) - 4  # channel 0: taps -4..-1, channel 1: taps 0..3
    packed = pack_weight(codes, 8)
    assert packed.shape == (1, 4, CHUNK)
    assert packed.view(torch.int8)[0, :, :3].tolist() == [[-4, 0, 0], [-3, 1, 0], [-2, 2, 0], [-1, 3, 0]]


def test_a_linear_weight_has_one_tap():
    assert pack_weight(torch.tensor([[1, -2], [7, -8]], dtype=torch.int8), 4)[:, 0, 0].tolist() == [0xE1, 0x87]


@pytest.mark.parametrize(("bits", "unsigned", "low", "high"), [(4, False, -8, 7), (4, True, 0, 15), (8, False, -128, 127)])
@pytest.mark.parametrize("channels", [1, 3, 31, 32, 33, 65])
def test_unpack_undoes_pack(bits, unsigned, low, high, channels):
    codes = random_codes(2, 3, channels, low=low, high=high)
    packed = pack_codes(codes, bits)
    assert packed.is_contiguous()
    assert packed.shape == (2, 3, code_bytes(channels, bits))
    assert torch.equal(unpack_codes(packed, bits, unsigned=unsigned, channels=channels), codes)
    assert not unpack_codes(packed, bits)[..., channels:].any()


def test_the_order_is_that_of_onnx_int4():
    codes = random_codes(64)
    assert torch.equal(pack_codes(codes, 4), pack_int4(codes))


def test_weight_sums_do_not_wrap():
    assert weight_sum(torch.full((2, 100, 3, 3), 127, dtype=torch.int8)).tolist() == [114300, 114300]
    assert weight_sum(torch.tensor([[1, -2], [7, 7]], dtype=torch.int8)).dtype == torch.int32


def test_zero_is_the_code_of_real_zero_at_each_row():
    qmin = torch.tensor([-3, 0, -15], dtype=torch.int32)
    assert zero_codes(qmin, 4, unsigned=True).tolist() == [[0x33] * 16, [0] * 16, [0xFF] * 16]
    assert not zero_codes(qmin, 4, unsigned=False).any()
    assert not zero_codes(qmin, 8, unsigned=False).any()


def test_kind_is_the_narrowest_that_is_exact():
    assert code_format(site([-8, 7], [(-8, 7), (-3, 4)])) == "s4"
    assert code_format(site([-8, 7], [(-8, 7), (-3, 12)])) == "u4"  # one row beyond 7 makes the whole site unsigned
    assert code_format(site([-8, 7], [(-15, 0), (0, 15)])) == "u4"
    assert code_format(site([-8, 7], [(-8, 8)], bits=8)) == "s8"  # 17 codes
    assert code_format(site([-9, 7], [(-3, 4)], bits=8)) == "s8"


def test_a_kind_says_its_bits():
    assert [bits_of(kind) for kind in ("s4", "u4", "s8")] == [4, 4, 8]
    with pytest.raises(InputError, match="No kernel kind 'u8'; expected s4, u4, s8"):
        bits_of("u8")


def test_a_weight_only_site_is_refused():
    weight_only = QuantizedLayer(
        op="linear", codes=torch.ones(1, 2, dtype=torch.int8), weight_scale=torch.ones(1), weight_bits=4, activation=None
    )
    with pytest.raises(UnsupportedError, match="A W4A16 site has no integer input"):
        code_format(weight_only)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r"weight codes in \[-9, 3\] do not fit 4 bits"):
        pack_weight(torch.tensor([[-9, 3]], dtype=torch.int8), 4)
    with pytest.raises(InputError, match=r"shape \[2\]; expected \[K, C, R, S\] or \[K, C\]"):
        pack_weight(torch.zeros(2, dtype=torch.int8), 4)
    with pytest.raises(InputError, match="codes of 5 bits: expected 4 or 8"):
        code_bytes(3, 5)
    with pytest.raises(InputError, match="unsigned codes of 8 bits: expected 4"):
        zero_codes(torch.zeros(1, dtype=torch.int32), 8, unsigned=True)
    with pytest.raises(InputError, match="qmin -16: an unsigned 4-bit code cannot represent real 0 below -15"):
        zero_codes(torch.tensor([-16]), 4, unsigned=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_codes_are_contiguous_whatever_view_they_come_from(bits):
    codes = torch.randint(-8, 8, (2, 32, 5), dtype=torch.int8)
    packed = pack_codes(codes.transpose(1, 2), bits)
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_codes(codes.transpose(1, 2).contiguous(), bits))
