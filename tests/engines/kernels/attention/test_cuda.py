"""From tensors to kernels and back: here in the emulator, on a GPU where there is one."""

import pytest
import torch

from engines.kernels import ops
from engines.kernels.attention import cpu, cuda
from engines.kernels.attention.operands import AttentionOperands

assert ops.SCHEMAS  # importing it defines the operators
# p and the output are each rounded to the type; a code of a key at a tie may differ by one, which changes a score by less than 1 % of its spread.
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def drawn(seed: int, *shape: int, keys: int, dtype: torch.dtype = torch.float16) -> AttentionOperands:
    """Views [B, H, L, D] of [B, L, H * D], as diffusers makes them; keys are far from 0."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, length, width = shape
    query, key, value = (torch.randn(batch, tokens, heads * width, generator=g) for tokens in (length, keys, keys))
    key += 2 * torch.randn(heads * width, generator=g)
    views = [x.to(dtype).view(batch, -1, heads, width).transpose(1, 2) for x in (query, key, value)]
    return AttentionOperands(*views, None)


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert found.stride() == expected.stride()
    error = (found.float() - expected.float()).norm() / expected.float().norm()
    assert error <= ROUNDING[found.dtype], error


@pytest.mark.parametrize(
    ("shape", "keys", "dtype"),
    [
        ((2, 2, 70, 64), 70, torch.float16),
        ((1, 2, 33, 40), 77, torch.bfloat16),
        ((1, 1, 20, 72), 100, torch.float16),
        ((1, 2, 65, 128), 40, torch.bfloat16),
        ((1, 1, 64, 160), 64, torch.float16),
    ],
)
def test_the_kernels_give_the_cpus_attention(shape, keys, dtype, launched):
    operands = drawn(1, *shape, keys=keys, dtype=dtype)
    assert_close(cuda.attention(operands), cpu.attention(operands))
    assert [entry.rsplit("_", 1)[0] for entry in launched[:2]] == ["attention_key_sums", "attention_key_codes"]
    assert len(launched) == 3


def test_views_of_one_product_are_read_where_they_lie(launched, monkeypatch):
    """Queries, keys and values as slices of [B, L, 3 H D]: nothing is copied. Tokens that do not start at 16 bytes are."""
    x = torch.randn(1, 20, 3 * 2 * 16).half()
    views = [part.view(1, 20, 2, 16).transpose(1, 2) for part in x.chunk(3, -1)]
    expected = cpu.attention(AttentionOperands(*views, 0.3))
    copies = []
    monkeypatch.setattr(cuda, "_readable", lambda x, real=cuda._readable: copies.append(real(x) is not x) or real(x))
    assert_close(cuda.attention(AttentionOperands(*views, 0.3)), expected)
    assert copies == [False, False, False]
    odd = torch.randn(1, 20, 3 * 32 + 4).half()[..., 4:]
    views = [part.unflatten(-1, (2, 16)).transpose(1, 2) for part in odd.chunk(3, -1)]
    assert_close(cuda.attention(AttentionOperands(*views, 0.3)), cpu.attention(AttentionOperands(*views, 0.3)))
    assert copies[3:] == [True, True, True]


def test_one_token_has_the_stride_that_torch_gives_it(launched):
    operands = drawn(2, 1, 1, 1, 24, keys=1)
    views = [x.as_strided(x.shape, (3, 5, 7, 1)) for x in (operands.query, operands.key, operands.value)]
    assert torch.equal(cuda.attention(AttentionOperands(*views, None)), operands.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 40, 64, 80, 96, 128, 160])
@pytest.mark.parametrize("tokens", [(1, 1), (64, 64), (300, 77), (1024, 1000)])
def test_a_gpu_gives_the_cpus_attention(width, tokens, dtype):
    operands = drawn(3, 2, 3, tokens[0], width, keys=tokens[1], dtype=dtype)
    moved = [x.cuda() for x in (operands.query, operands.key, operands.value)]
    found = torch.ops.edm_deploy.attention_s8(*moved, None)
    assert_close(found.cpu(), cpu.attention(operands))
