from __future__ import annotations

import torch

from engines.kernels.cpu.memory import ALIGNMENT, Memory


def test_a_freed_block_serves_the_next_tensor_of_about_its_size():
    memory = Memory()
    first, second = memory.empty((100,), torch.float32), memory.empty((100,), torch.float32)
    assert first.data_ptr() != second.data_ptr()
    memory.free(first.untyped_storage().data_ptr())
    assert memory.empty((1000,), torch.float32).data_ptr() != first.data_ptr()  # too large for it
    assert memory.empty((10,), torch.float32).data_ptr() != first.data_ptr()  # would waste most of it
    assert memory.empty((60, 2), torch.bfloat16).data_ptr() == first.data_ptr()


def test_tensors_are_aligned_and_have_their_strides():
    memory = Memory()
    for shape in ((3, 5, 7), (1,), (0, 4)):
        assert memory.empty(shape, torch.uint8).data_ptr() % ALIGNMENT == 0
    last = memory.empty((2, 3, 4, 5), torch.float16, (60, 1, 15, 3))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert memory.owns(last)
    assert not memory.owns(torch.zeros(3))
    assert memory.total >= 240


def test_what_is_known_of_codes_is_forgotten_with_them():
    memory = Memory()
    codes = memory.empty((64,), torch.uint8)
    memory.bounds[codes.data_ptr()] = (-8, 7)
    memory.free(codes.untyped_storage().data_ptr())
    assert memory.empty((64,), torch.uint8).data_ptr() == codes.data_ptr()
    assert memory.bounds == {}
