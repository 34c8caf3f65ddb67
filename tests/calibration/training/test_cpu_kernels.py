import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.nn import functional

from calibration.training.cpu_kernels import AttentionByProducts, attention, group_norm, use_cpu_kernels
from tests.conftest import TINY_UNET


def heads(*shape, dtype):
    return [torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)]


def test_attention_by_products_is_attention():
    query, key, value = heads(2, 3, 16, 8, dtype=torch.float64)
    expected = torch.softmax(query @ key.transpose(-1, -2) / 8**0.5, -1) @ value
    assert torch.allclose(attention(query, key, value), expected)
    assert torch.allclose(attention(query, key, value, scale=0.5), functional.scaled_dot_product_attention(query, key, value, scale=0.5))


def test_bfloat16_attention_is_as_close_to_float32_as_torchs_own():
    query, key, value = heads(2, 2, 64, 32, dtype=torch.bfloat16)
    exact = functional.scaled_dot_product_attention(query.float(), key.float(), value.float())
    own = functional.scaled_dot_product_attention(query, key, value)
    with AttentionByProducts():
        found = functional.scaled_dot_product_attention(query, key, value)
    assert not torch.equal(found, own)  # it was replaced
    errors = [float((each.float() - exact).norm() / exact.norm()) for each in (found, own)]
    assert errors[0] < 2 * errors[1] + 2**-9  # one more rounding to bfloat16, of the probabilities
    assert found.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "options", "tokens"),
    [
        (torch.float32, {}, 16),
        (torch.bfloat16, {"is_causal": True}, 16),
        (torch.bfloat16, {"attn_mask": torch.ones(16, 16).tril() > 0}, 16),
        (torch.bfloat16, {}, 1024),
    ],
    ids=["float32", "causal", "masked", "long"],
)
def test_other_attention_stays_torchs(dtype, options, tokens):
    query, key, value = heads(1, 1, tokens, 8, dtype=dtype)
    with AttentionByProducts():
        found = functional.scaled_dot_product_attention(query, key, value, **options)
    assert torch.equal(found, functional.scaled_dot_product_attention(query, key, value, **options))


def test_under_autocast_attention_is_in_bfloat16():
    query, key, value = heads(1, 2, 16, 8, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), AttentionByProducts():
        found = functional.scaled_dot_product_attention(query, key, value)
    assert torch.equal(found, attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))


def test_a_small_group_norm_in_channels_last_keeps_values_and_layout():
    norm, x = nn.GroupNorm(4, 8), torch.randn(2, 8, 6, 6).bfloat16().contiguous(memory_format=torch.channels_last)
    found = group_norm(norm, x)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found, functional.group_norm(x.contiguous(), 4, norm.weight, norm.bias))
    wide = x.float()
    assert torch.equal(group_norm(norm, wide), norm(wide))


def test_a_float32_model_computes_the_same_bit_for_bit_and_a_copy_has_weights_of_its_own():
    torch.manual_seed(0)
    model = UNet2DModel(**TINY_UNET).eval().to(memory_format=torch.channels_last)
    sample, timestep = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last), torch.tensor([10, 500])
    expected = model(sample, timestep).sample
    use_cpu_kernels(model)
    assert torch.equal(model(sample, timestep).sample, expected)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not bool(other(sample, timestep).sample.any())
    assert torch.equal(model(sample, timestep).sample, expected)
