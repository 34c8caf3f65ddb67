"""Operands that do not fit are refused by every operator, before a kernel reads them."""

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.numerics.kernel_layout import zero_codes
from tests.engines.kernels.test_ops import HALF, OPS, example


def changed(op: str, **changes) -> tuple:
    """The example's arguments with some replaced, by their names in the schema."""
    names = [argument.name for argument in getattr(OPS, op).default._schema.arguments]
    return tuple(changes.get(name, value) for name, value in zip(names, example(op), strict=True))


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("quantize", {"x": torch.zeros(2, 8, 4, 4)}, "x is float32; the kernels read float16 and bfloat16"),
        ("quantize", {"x": torch.zeros(2, dtype=HALF)}, r"x has shape \[2\]; expected \[B, C, H, W\]"),
        ("quantize", {"x": torch.zeros(2, 8, 0, 4, dtype=HALF)}, r"x is empty, \[2, 8, 0, 4\]"),
        ("quantize", {"rows": torch.zeros(2, dtype=torch.int64)}, r"rows is int64 \[2\] on cpu; expected int32 \[2\] on cpu"),
        ("quantize", {"rows": torch.zeros(3, dtype=torch.int32)}, r"rows is int32 \[3\] on cpu; expected int32 \[2\] on cpu"),
        ("quantize", {"rows": torch.zeros(2, dtype=torch.int32, device="meta")}, "on meta; expected int32"),
        ("quantize", {"rows": torch.zeros(4, dtype=torch.int32)[::2]}, r"rows \[2\] has strides \[2\]. Call .contiguous"),
        ("quantize", {"rows": torch.tensor([0, 2], dtype=torch.int32)}, r"rows \[0, 2\] reach beyond the table; expected 0 to 1"),
        ("quantize", {"qmin": torch.zeros(2, dtype=torch.int8)}, r"qmin is int8 \[2\] on cpu; expected int32"),
        ("quantize", {"qmax": torch.zeros(1, dtype=torch.int32)}, r"qmax is int32 \[1\] on cpu; expected int32 \[2\]"),
        ("quantize", {"bits": 5}, "codes of 5 bits: expected 4 or 8"),
        ("quantize", {"bits": 8}, "unsigned codes of 8 bits: expected 4"),
        ("quantize", {"activation": "relu"}, "activation 'relu'; expected one of none, silu, gelu, gelu_tanh, geglu"),
        ("quantize", {"activation": "geglu"}, r"geglu of x \[2, 8, 4, 4\]; expected \[B, ..., 2C\]"),
        ("quantize", {"x": torch.zeros(2, 3, 7, dtype=HALF), "activation": "geglu"}, r"geglu of x \[2, 3, 7\]"),
        ("quantize_normed", {"activation": "gelu"}, "activation 'gelu'; expected one of none, silu"),
        ("group_stats", {"groups": 3}, "8 channels do not fall into 3 equal groups"),
        ("group_stats", {"eps": -1.0}, "eps -1.0; expected at least 0"),
        ("quantize_normed", {"groups": 4}, r"mean is float32 \[2, 2\] on cpu; expected float32 \[2, 4\]"),
        ("quantize_normed", {"gamma": torch.ones(4)}, r"gamma is float32 \[4\] on cpu; expected float32 \[8\]"),
        ("quantize_row_normed", {"x": torch.zeros(2, 8, 4, 4, dtype=HALF)}, r"x has shape \[2, 8, 4, 4\]; expected tokens"),
        ("quantize_row_normed", {"eps": -1.0}, "quantize_row_normed: eps -1.0; expected at least 0"),
        ("quantize_row_normed", {"gamma": torch.ones(8, dtype=HALF)}, r"gamma is float16 \[8\] on cpu; expected float32 \[8\]"),
        ("quantize_row_normed", {"scale": torch.ones(1, 8, dtype=HALF)}, r"scale is float16 \[1, 8\] on cpu; expected float16 \[2, 8\]"),
        ("quantize", {"rotation": 8}, r"rotation of x \[2, 8, 4, 4\]; expected tokens"),
        (
            "quantize",
            {"x": torch.zeros(2, 3, 12, dtype=HALF), "rotation": 8},
            "rotation in blocks of 8 of 12 channels; expected a power of two",
        ),
        (
            "quantize_row_normed",
            {"rotation": 512},
            "rotation in blocks of 512 of 8 channels; expected a power of two that divides them, 2 to 256",
        ),
        ("linear", {"low": torch.zeros(2, 4, 4, 8, dtype=torch.bfloat16)}, "a branch has two operands, low and up; only low is given"),
        (
            "linear",
            {"low": torch.zeros(2, 4, 4, 4, dtype=torch.bfloat16), "up": torch.zeros(6, 4, dtype=torch.bfloat16)},
            "a branch of rank 4; expected a multiple of 8",
        ),
        (
            "linear",
            {"low": torch.zeros(2, 4, 4, 8, dtype=torch.bfloat16), "up": torch.zeros(5, 8, dtype=torch.bfloat16)},
            r"up is bfloat16 \[5, 8\] on cpu; expected bfloat16 \[6, 8\]",
        ),
        (
            "conv2d",
            {"low": torch.zeros(2, 4, 4, 8, dtype=HALF), "up": torch.zeros(6, 8, dtype=HALF)},
            r"low is float16 \[2, 4, 4, 8\] on cpu; expected float16 \[2, 8, 4, 4\]",
        ),
        (
            "rotary",
            {"x": torch.zeros(2, 5, 3, 12, dtype=HALF)},
            r"x is torch.float16 \[2, 5, 3, 12\]; .* a multiple of 8. Rotate it in torch",
        ),
        ("rotary", {"sine": torch.zeros(4, 16)}, r"sine is torch.float32 \[4, 16\] on cpu; expected float32 \[5, 16\]"),
        ("conv2d", {"codes": torch.zeros(2, 4, 4, 8, dtype=torch.uint8)}, "expected .B, H, W, Cb., Cb a multiple of 16"),
        (
            "conv2d",
            {"codes": torch.zeros(2, 4, 4, 32, dtype=torch.uint8)},
            r"weight is uint8 \[6, 9, 16\] on cpu; expected uint8 \[6, 9, 32\]",
        ),
        ("conv2d", {"codes": torch.zeros(2, 4, 4, 32, dtype=torch.uint8)[..., ::2]}, "codes .2, 4, 4, 16. has strides"),
        ("conv2d", {"codes": torch.zeros(2, 4, 4, 16, dtype=torch.int8)}, "codes is int8"),
        ("conv2d", {"weight": torch.zeros(6, 16, dtype=torch.uint8)}, r"weight has shape \[6, 16\]; expected \[K, R \* S, Cb\]"),
        ("conv2d", {"zero": torch.zeros(1, 16, dtype=torch.uint8)}, r"zero is uint8 \[1, 16\] on cpu; expected uint8 \[2, 16\]"),
        ("conv2d", {"bias": torch.zeros(6, dtype=HALF)}, r"bias is float16 \[6\] on cpu; expected float32 \[6\]"),
        ("conv2d", {"weight_sum": torch.zeros(5, dtype=torch.int32)}, r"weight_sum is int32 \[5\] on cpu; expected int32 \[6\]"),
        (
            "conv2d",
            {"residual": torch.zeros(2, 6, 2, 2, dtype=HALF)},
            r"residual is float16 \[2, 6, 2, 2\] on cpu; expected float16 \[2, 6, 4, 4\]",
        ),
        ("conv2d", {"sample_bias": torch.zeros(2, 5, dtype=HALF)}, r"sample_bias is float16 \[2, 5\] on cpu; expected float16 \[2, 6\]"),
        ("conv2d", {"gate": torch.zeros(2, 6)}, r"gate is float32 \[2, 6\] on cpu; expected float16 \[2, 6\]"),
        (
            "conv2d",
            {"dtype": torch.float32, "residual": None, "sample_bias": None, "gate": None, "low": None, "up": None},
            "output type float32; the kernels write float16 and bfloat16",
        ),
        ("conv2d", {"kind": "u8"}, "No kernel kind 'u8'"),
        ("conv2d", {"padding": -2}, "a 3x3 filter with padding -2 does not fit into a map of 4x4"),
        ("linear", {"leading": [2, 9]}, r"codes \[B, L, 1, Cb\] are \[2, 16, 1, 16\], which is not \[2, 9\] vectors"),
        ("linear", {"leading": [32]}, r"which is not \[32\] vectors"),
    ],
)
def test_what_does_not_fit_is_refused(op, changes, message):
    with pytest.raises(InputError, match=message):
        getattr(OPS, op)(*changed(op, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kernel": [5, 5]}, "conv2d: a 5x5 filter with stride 1; the kernels have 1x1, 2x2, 3x3 with stride 1 or 2"),
        ({"stride": 3}, "a 3x3 filter with stride 3"),
    ],
)
def test_a_filter_without_a_kernel_is_named(changes, message):
    with pytest.raises(UnsupportedError, match=message):
        OPS.conv2d(*changed("conv2d", **changes))


def test_a_token_of_more_channels_than_a_block_holds_is_refused():
    x = torch.zeros(2, 1, 8200, dtype=HALF)
    with pytest.raises(UnsupportedError, match="quantize_row_normed: 8200 channels; the kernel normalizes 8192 at most"):
        OPS.quantize_row_normed(x, None, None, None, None, 1e-6, False, *example("quantize")[1:-2], 0)


def test_a_sum_that_could_pass_int32_is_refused():
    """131072 * 128 * 128 is 2^31 exactly."""
    rows, one, zero = torch.zeros(1, dtype=torch.int32), torch.ones(1), torch.zeros(1, dtype=torch.int32)
    operands = (zero_codes(zero, 8, unsigned=False), one, zero, one, zero, None, None, None, None, None, None, False, "s8", [1], HALF)
    codes, weight = torch.zeros(1, 1, 1, 131072, dtype=torch.uint8), torch.zeros(1, 1, 131072, dtype=torch.uint8)
    with pytest.raises(UnsupportedError, match="a sum of 131072 products of s8 codes may exceed int32"):
        OPS.linear(codes, rows, weight, *operands)
    OPS.linear(codes[..., :131056].contiguous(), rows, weight[..., :131056].contiguous(), *operands)


def test_a_tensor_beyond_what_a_kernel_can_count_is_refused():
    """The 2^31 elements are one element, seen through strides of 0."""
    x = torch.zeros(1, dtype=HALF).expand(1, 2**20, 2**11)
    table = example("quantize")[2:]
    with pytest.raises(UnsupportedError, match=r"quantize: x \[1, 1048576, 2048\] has 2147483648 elements"):
        OPS.quantize(x, torch.zeros(1, dtype=torch.int32), *table)
