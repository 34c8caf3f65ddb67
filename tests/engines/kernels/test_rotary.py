"""The rotation through its launch, in the emulator: layouts and alignments that the kernel itself does not take."""

import pytest
import torch

from engines.kernels import rotary


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_launch_gives_the_bits_of_the_cpu_for_any_layout(dtype, launched):
    x, (cosine, sine) = torch.randn(2, 5, 3, 24).to(dtype), torch.randn(2, 5, 24)
    room = torch.randn(x.numel() + 1).to(dtype)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    unaligned = room[1:].view(x.shape).copy_(x)
    assert unaligned.data_ptr() % 16
    expected = rotary.on_cpu(x, cosine, sine)
    for each in (x, strided, unaligned):
        found = rotary.on_cuda(each, cosine, sine)
        assert found.is_contiguous()
        assert torch.equal(found, expected)
    assert len(launched) == 3


def test_a_quarter_turn_swaps_a_pair():
    cosine, sine = torch.zeros(1, 8), torch.ones(1, 8)
    x = torch.arange(8.0).half().reshape(1, 1, 1, 8)
    assert torch.ops.edm_deploy.rotary(x, cosine, sine).flatten().tolist() == [-1.0, 0.0, -3.0, 2.0, -5.0, 4.0, -7.0, 6.0]
