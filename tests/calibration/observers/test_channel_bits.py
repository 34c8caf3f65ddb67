import pytest
import torch

from calibration.observers.channel_bits import kurtosis, mix_channel_bits, mixed_bits, scales_of, top_share
from calibration.observers.channel_scaling import scalable
from calibration.recipes.minmax import MinMax
from tests.calibration.tiny import tiny_context


def test_kurtosis_is_one_for_two_values_and_large_for_an_outlier():
    # Centred 1: mean of fourth powers 1, variance 1. One outlier in five: 4, -1, -1, -1, -1: (256 + 4) / 5 / (20 / 5)^2.
    weight = torch.tensor([[1.0, -1, 1, -1, 1, -1], [0.0] * 6])
    assert kurtosis(weight).tolist() == [1.0, 0.0]
    assert float(kurtosis(torch.tensor([[5.0, 0, 0, 0, 0]]))) == pytest.approx(52 / 16)


def test_as_many_channels_get_one_bit_more_as_one_bit_less():
    assert mixed_bits(torch.tensor([3.0, 1.0, 9.0, 2.0]), 4, 0.25).tolist() == [4, 3, 5, 4]


@pytest.mark.parametrize(("bits", "share"), [(2, 0.25), (8, 0.25), (4, 0.2), (4, 0.0)])
def test_bits_are_not_mixed_if_no_channel_can_change(bits, share):
    assert mixed_bits(torch.arange(4.0), bits, share) is None


def test_channels_are_scaled_at_their_own_bits():
    weight = torch.tensor([[7.0, -3.0], [3.0, 1.0]])
    assert scales_of(MinMax(), weight, torch.tensor([4, 3])).tolist() == [1.0, 1.0]


def test_bits_are_mixed_only_if_that_lowers_the_output_error():
    recipe = MinMax(weight_bits=4)
    context = tiny_context(MinMax(rows=3))
    student = context.student
    names = [name for name in student.layers if student.family.placement(name) == "quantize"]
    for name in names:
        layer = student.layers[name]
        layer.bits = 4
        layer.set_weight_scale(recipe.weight_scale(layer.merged_weight(), 4))
    heavy = next(name for name in scalable(student) if student.family.group(name) == "convolution")
    weight = student.layers[heavy].layer.weight.clone()
    weight[0, 0, 0, 0] = 8 * weight[0].abs().max()  # at 4 bits all other weights of this channel would be lost
    student.layers[heavy].layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    student.layers[heavy].set_weight_scale(recipe.weight_scale(weight, 4))
    changed, layers = mix_channel_bits(context, recipe, 0.125)
    assert layers == len(names)
    assert changed == sum(student.layers[name].channel_bits is not None for name in names)
    bits = student.layers[heavy].channel_bits
    assert (int(bits[0]), float(bits.float().mean())) == (5, 4.0)
    assert context.trajectories.next_index == 0


def test_the_heaviest_share_is_rounded_up():
    assert top_share(torch.tensor([1.0, 5.0, 2.0, 4.0, 3.0]), 0.3).tolist() == [False, True, False, True, False]
