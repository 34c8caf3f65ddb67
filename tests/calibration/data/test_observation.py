import torch

from calibration.data.observation import ActivationSamples


def test_the_sum_of_two_rows_holds_all_values_and_the_extremes_of_both():
    both = ActivationSamples(torch.tensor([1.0, 2.0]), -1.0, 2.0) + ActivationSamples(torch.tensor([5.0]), 0.0, 7.0)
    assert (both.values.tolist(), both.low, both.high) == ([1.0, 2.0, 5.0], -1.0, 7.0)


def test_a_subsample_is_random_and_keeps_the_extremes():
    few = ActivationSamples(torch.arange(100.0), -3.0, 200.0).subsample(8, torch.Generator().manual_seed(0))
    assert (len(few.values), few.low, few.high) == (13, -3.0, 200.0)
    assert len(few.values.unique()) > 10
