import math

import pytest
import torch
from torch.nn import functional

from engines.kernels.attention import cpu
from engines.kernels.attention.operands import LOG2_E, AttentionOperands
from tests.engines.kernels.attention.test_cuda import drawn


def test_codes_by_hand():
    """Of [2.54, 1, -0.01]: largest 2.54, so 1 is code 50 and -0.01 is -0.5, which rounds to even. Of zeros: zeros. NaN: the lowest."""
    nan = float("nan")
    codes, scale = cpu.head_codes(torch.tensor([[2.54, 1.0, -0.01], [0.0, 0.0, 0.0], [nan, 1.0, -1.0]]))
    assert codes.tolist() == [[127, 50, 0], [0, 0, 0], [-127, 127, -127]]
    assert scale[:1].tolist() == pytest.approx([0.02])
    assert 0 < scale[1] < 1e-30


def test_attention_by_hand():
    """Scores are products of codes exactly: 127 * 127 * scales = 1 and -1 of two keys, so weights are e and 1 / e."""
    query, key = torch.tensor([[[[1.0] + [0.0] * 7]]]).half(), torch.tensor([[[[1.0] + [0.0] * 7, [-1.0] + [0.0] * 7]]]).half()
    value = torch.tensor([[[[1.0] * 8, [0.0] * 8]]]).half()
    found = cpu.attention(AttentionOperands(query, key, value, 1.0))
    assert found.float().unique().tolist() == pytest.approx([math.e / (math.e + 1 / math.e)], rel=2**-11)


def test_a_mean_of_the_keys_changes_nothing_but_rounding():
    operands = drawn(0, 1, 2, 30, 40, keys=50)
    assert cpu.smoothed(operands.key).mean(2).abs().max() < 1e-6
    shifted = AttentionOperands(operands.query, operands.key + 4, operands.value, None)
    exact = functional.scaled_dot_product_attention(operands.query, shifted.key, operands.value)
    assert (cpu.attention(shifted).float() - exact.float()).norm() < 0.02 * exact.float().norm()


def test_powers_are_relative_to_the_largest_with_one_rounding():
    scores, factor = torch.tensor([[3.0, 1.0, -200.0]]), torch.tensor([[0.5]])
    assert cpu.powers_of(scores, factor).tolist() == [pytest.approx([1.0, 0.5, 2.0**-101.5])]


@pytest.mark.parametrize("width", [40, 64, 80, 128, 160])
@pytest.mark.parametrize("keys", [77, 300])
def test_it_is_near_float_attention(width, keys):
    """8 bits of normal values: 1 % of relative error, of which the cosine leaves 1e-4. The error of float16 itself is a tenth of that."""
    operands = drawn(width, 1, 2, 100, width, keys=keys)
    query, key, value = (x.double() for x in (operands.query, operands.key, operands.value))
    exact = functional.scaled_dot_product_attention(query, key, value)
    found = torch.ops.edm_deploy.attention_s8(operands.query, operands.key, operands.value, None).double()
    assert (found - exact).norm() < 0.02 * exact.norm()
    assert 1 - functional.cosine_similarity(found.flatten(), exact.flatten(), dim=0) < 2e-4


def test_scale_is_a_factor_of_the_scores():
    operands = drawn(5, 1, 1, 20, 16, keys=30)
    assert AttentionOperands(operands.query, operands.key, operands.value, 0.25).factor == 0.25 * LOG2_E
    doubled = AttentionOperands(operands.query * 2, operands.key, operands.value, 0.125)
    assert torch.equal(cpu.attention(doubled), cpu.attention(AttentionOperands(operands.query, operands.key, operands.value, 0.25)))


def test_nan_of_a_value_is_not_hidden():
    operands = drawn(6, 1, 1, 4, 8, keys=5)
    operands.value[0, 0, 2, 3] = float("nan")
    assert cpu.attention(operands)[..., 3].isnan().all()
