import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from engines.kernels import ops
from engines.kernels.attention.operands import AttentionOperands, supports

assert ops.SCHEMAS  # importing it defines the operators


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.float16)


@pytest.mark.parametrize(
    ("operands", "error", "message"),
    [
        ((half(1, 2, 3, 8), half(1, 2, 4, 8).float(), half(1, 2, 4, 8)), InputError, "key is float32 on cpu; expected all of float16"),
        ((half(1, 2, 3, 8), half(1, 2, 4, 8), half(1, 2, 4, 8).bfloat16()), InputError, "value is bfloat16 on cpu"),
        ((half(3, 8), half(4, 8), half(4, 8)), InputError, r"query has shape \[3, 8\]; expected \[B, H, tokens, D\]"),
        ((half(1, 2, 3, 8), half(1, 2, 0, 8), half(1, 2, 0, 8)), InputError, "with at least one element"),
        ((half(1, 2, 3, 8), half(1, 1, 4, 8), half(1, 1, 4, 8)), InputError, r"query \[1, 2, 3, 8\], key \[1, 1, 4, 8\]"),
        ((half(1, 2, 3, 8), half(1, 2, 4, 8), half(1, 2, 4, 16)), InputError, r"expected \[B, H, Lq, D\] and \[B, H, Lk, D\] twice"),
        ((half(1, 2, 3, 12), half(1, 2, 4, 12), half(1, 2, 4, 12)), UnsupportedError, "heads of 12 elements; .* multiples of 8 up to 160"),
        ((half(1, 1, 1, 168), half(1, 1, 1, 168), half(1, 1, 1, 168)), UnsupportedError, "heads of 168 elements"),
        ((half(70000, 1, 1, 8), half(70000, 1, 1, 8), half(70000, 1, 1, 8)), UnsupportedError, "more than 65535 samples or heads"),
    ],
)
def test_what_the_kernels_cannot_read_is_named(operands, error, message):
    with pytest.raises(error, match=message):
        torch.ops.edm_deploy.attention_s8(*operands, None)


def test_more_elements_than_an_int_counts_are_refused():
    many = torch.empty(1, 1, 1, dtype=torch.float16).expand(2**28, 1, 8).unsqueeze(0)
    operands = AttentionOperands(many.transpose(1, 2), many.transpose(1, 2), many.transpose(1, 2), None)
    operands.check()
    with pytest.raises(UnsupportedError, match="the kernels count to 2147483647"):
        operands.check_sizes()


def test_heads_of_eighths_up_to_160_are_supported():
    assert [width for width in range(-8, 200) if supports(width)] == list(range(8, 161, 8))


def test_the_scale_is_that_of_softmax_unless_it_is_named():
    x = half(1, 1, 1, 64)
    assert AttentionOperands(x, x, x, None).factor == pytest.approx(64**-0.5 * 1.4426950408889634)
    assert AttentionOperands(x, x, x, 1.0).factor == pytest.approx(1.4426950408889634)
