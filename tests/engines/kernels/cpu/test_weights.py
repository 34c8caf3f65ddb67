from __future__ import annotations

import itertools

import pytest
import torch

from edm_deploy.numerics.kernel_layout import pack_weight
from engines.kernels.cpu import weights
from engines.kernels.cpu.weights import Weights, arranged, is_exact_input, transformed

G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]])  # of the source
B = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])


def packed(outputs: int, channels: int, taps: int, low: int, high: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pack_weight(torch.randint(low, high + 1, (outputs, channels, taps, taps), generator=generator, dtype=torch.int8), 8)


def test_a_direct_weight_lies_in_groups_of_channels_taps_and_fours():
    weight = packed(70, 20, 3, -128, 127)
    made = arranged(weight, 4)
    codes = weight.view(torch.int8)
    assert made.weight.numel() == 80 * 9 * 32  # K filled up to 16, C to 16
    group = made.weight[: 64 * 9 * 32].view(9, 8, 64, 4)
    assert torch.equal(group[5, 2, 33], codes[33, 5, 8:12])
    last = made.weight[64 * 9 * 32 :].view(9, 8, 16, 4)
    assert torch.equal(last[8, 4, 5], codes[69, 8, 16:20])
    assert not last[:, :, 6:].any()
    assert made.start.tolist() == (-128 * codes.int().sum((1, 2))).tolist() + 10 * [0]


def test_a_transformed_weight_is_four_times_the_sources():
    weight = packed(32, 32, 3, -8, 7)
    made = transformed(weight, 4)
    assert made is not None
    taps = weight.view(torch.int8)[17].view(3, 3, 32)[..., 9].float()
    expected = (4 * G @ taps @ G.T).flatten()
    assert torch.equal(made.weight.view(16, 8, 32, 4)[:, 2, 17, 1].float(), expected)
    assert torch.equal(made.start[:, 17], -128 * made.weight.view(16, 8, 32, 4)[:, :, 17].sum((1, 2), dtype=torch.int32))


def test_a_filter_whose_transform_leaves_8_bits_is_not_transformed():
    assert transformed(packed(32, 32, 3, -127, 127), 4) is None
    weight = torch.zeros(32, 32, 3, 3, dtype=torch.int8)
    weight[31, 31] = 14  # nine of them: 126
    assert transformed(pack_weight(weight, 8), 4) is not None
    weight[31, 31, 1, 1] = 16
    assert transformed(pack_weight(weight, 8), 4) is None
    assert transformed(packed(16, 32, 3, -8, 7), 4) is None  # too few channels to gain


def test_the_bound_of_an_input_is_that_of_its_worst_tile():
    """Of each place of the transform: the largest sum that codes in [low, high], or 0 outside the map, can have."""
    for low, high in itertools.chain(((-8, 7), (0, 15), (-15, 0), (-128, 127)), itertools.product(range(-40, 1, 4), range(0, 41, 3))):
        signs = torch.einsum("ir,js->ijrs", B, B)
        largest = int((signs.clamp(min=0) * high + signs.clamp(max=0) * low).sum((2, 3)).max())
        smallest = int((signs.clamp(min=0) * low + signs.clamp(max=0) * high).sum((2, 3)).min())
        assert is_exact_input(low, high) == (largest <= 127 and smallest >= -128), (low, high)


def test_a_weight_is_arranged_once_for_all_recordings():
    held, weight = Weights(), packed(32, 32, 3, -8, 7)
    direct, narrow = held.of(weight, None, 4), held.of(weight, (-8, 7), 4)
    assert (direct.transformed, narrow.transformed) == (False, True)
    assert held.of(weight, None, 4) is direct
    assert held.of(weight, (0, 15), 4) is narrow
    assert not held.of(weight, (-128, 127), 4).transformed
    assert held.zero(32).tolist() == 32 * [0]


@pytest.mark.parametrize("vectors", [2, 4])
def test_starts_undo_the_offset_of_the_codes(vectors):
    weight = packed(40, 16, 1, -128, 127)
    made = arranged(weight, vectors)
    assert torch.equal(made.start[:40], -weights.OFFSET * weight.view(torch.int8).sum((1, 2), dtype=torch.int32))
