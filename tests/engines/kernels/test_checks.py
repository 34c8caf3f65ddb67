"""Checks that no operator's own test reaches; what operators refuse is in test_operands.py."""

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from engines.kernels import checks


def test_a_size_is_counted_over_all_axes():
    checks.check_size("op", x=[2**15, 2**15])
    with pytest.raises(UnsupportedError, match=r"op: x \[65536, 32768\] has 2147483648 elements, the kernels count to 2147483647"):
        checks.check_size("op", x=[2**16, 2**15])


@pytest.mark.parametrize("rotation", [1, 3, 6, 512])
def test_a_rotation_has_blocks_of_a_power_of_two_that_divides_the_channels(rotation):
    x = torch.zeros(2, 3, 1536, dtype=torch.float16)
    for fits in (0, 2, 256):
        checks.check_rotation("op", x, 1536, fits)
    with pytest.raises(InputError, match=f"op: rotation in blocks of {rotation} of 1536 channels; expected a power of two"):
        checks.check_rotation("op", x, 1536, rotation)


def test_a_tensor_is_described_with_what_was_expected():
    with pytest.raises(InputError, match=r"op: scale is float64 \[3\] on cpu; expected float32 \[2\] on cpu"):
        checks.expect("op", "scale", torch.zeros(3, dtype=torch.float64), torch.float32, [2], torch.device("cpu"))
    assert checks.words(torch.bfloat16) == "bfloat16"
