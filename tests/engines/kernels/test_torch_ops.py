"""The kernels' CPU twins, on numbers that are checked by hand. tests/engines/kernels/test_ops.py compares them with the reference."""

import torch
from torch import nn

from edm_deploy.numerics.kernel_layout import pack_codes, pack_weight, unpack_codes
from engines.kernels import torch_ops
from engines.kernels.operands import Norm, Operands, Table


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def test_nan_becomes_the_lowest_code_and_infinities_the_bounds():
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), -0.0]]).half()
    table = Table(int32(0), torch.ones(1), int32(-3), int32(12), 8, unsigned=False)
    codes = torch_ops.quantize(x, None, table)
    assert unpack_codes(codes, 8, channels=4).flatten().tolist() == [-3, 12, -3, 0]


def test_unsigned_codes_are_stored_above_the_lowest():
    table = Table(int32(0), torch.ones(1), int32(-3), int32(12), 4, unsigned=True)
    codes = torch_ops.quantize(torch.tensor([[-5.0, 0.0, 12.0]]).half(), None, table)
    assert unpack_codes(codes, 4, unsigned=True, channels=3).flatten().tolist() == [0, 3, 15]


def test_gelu_is_within_two_to_the_minus_19_of_the_exact_function():
    x = torch.linspace(-8, 8, 200001)
    exact = nn.functional.gelu(x.double())
    error = (torch_ops.gelu(x).double() - exact).abs()
    assert float(error.max()) < 2.0**-19
    assert bool((error <= 2.0**-19 * exact.abs())[x > -1].all())
    assert torch_ops.gelu(torch.tensor([float("inf"), -float("inf"), -1e30, float("nan")])).isnan().tolist() == [False, False, False, True]


def test_a_fused_multiply_add_rounds_once():
    """2^-40 or 2^-36 of half a last place below and above a tie, where a sum rounded to float64 first is the tie itself."""
    a, b = torch.tensor([1 + 2.0**-20, 1 + 2.0**-12]), torch.tensor([1 - 2.0**-20, 1 - 2.0**-12 + 2.0**-24]) * 2.0**-24
    c = torch.tensor([1 + 2.0**-23, 1 + 2.0**-22])
    assert (a.double() * b.double() + c.double()).float().tolist() == [1 + 2.0**-22, 1 + 2.0**-22]  # ties, to the even neighbour
    assert torch_ops.fused_multiply_add(a, b, c).tolist() == [1 + 2.0**-23, 1 + 2.0**-22 + 2.0**-23]
    assert torch_ops.fused_multiply_add(a, b, torch.tensor([float("inf"), float("nan")])).isfinite().tolist() == [False, False]


def test_statistics_are_of_each_sample_and_group():
    x = torch.tensor([[[[1.0]], [[3.0]], [[10.0]], [[10.0]]]]).half()  # two groups of two channels
    mean, rstd = torch_ops.group_stats(x, 2, eps=1.0)
    assert mean.tolist() == [[2.0, 10.0]]
    assert torch.equal(rstd, torch.tensor([[2.0**-0.5, 1.0]]))


def test_a_norm_without_gamma_or_beta_leaves_the_step_out():
    x = torch.tensor([3.0, 5.0]).reshape(1, 1, 1, 2)
    statistics = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    assert torch_ops.normed(x, Norm(*statistics, None, None)).flatten().tolist() == [1.0, 2.0]
    assert torch_ops.normed(x, Norm(*statistics, torch.tensor([2.0, 3.0]), torch.tensor([1.0, -1.0]))).flatten().tolist() == [3.0, 5.0]


def test_pixels_around_the_map_hold_the_code_of_zero():
    """The map is 1 - qmin = 4 everywhere, so real 1; the filter sums nine taps, of which a corner of a 2x2 map covers four."""
    codes = pack_codes(torch.full((1, 2, 2, 1), 4, dtype=torch.int8), 4)
    weight = pack_weight(torch.ones(1, 1, 3, 3, dtype=torch.int8), 4)
    zero = torch.full((1, 16), 0x33, dtype=torch.uint8)  # 0 - qmin in both nibbles
    columns = (torch.tensor([0.5]), int32(-3), torch.tensor([2.0]), int32(9))
    operands = Operands(codes, int32(0), weight, zero, *columns, torch.tensor([10.0]), None, None, None, None, None, False, "u4")
    y = torch_ops.convolve(operands, operands.shape("test", (3, 3), stride=1, padding=1), torch.float16)
    assert y.flatten().tolist() == [14.0] * 4
