import torch
from torch import nn

from calibration.observers.observers import SAMPLES_PER_BATCH, InputMean, MinMaxObserver, Observer


def test_extremes_are_those_of_all_values_although_only_a_subset_is_kept():
    observer = Observer(torch.Generator().manual_seed(0))
    x = torch.zeros(SAMPLES_PER_BATCH * 4)
    x[5], x[7] = -3.0, 12.0
    observer(nn.Identity(), (x,))
    observed = observer.pop()
    assert (observed.low, observed.high, len(observed.values)) == (-3.0, 12.0, SAMPLES_PER_BATCH)


def test_an_observer_is_reset_for_the_next_row():
    observer = Observer(torch.Generator().manual_seed(0))
    observer(nn.Identity(), (torch.tensor([5.0]),))
    observer.pop()
    observer(nn.Identity(), (torch.tensor([1.0]),))
    assert observer.pop().high == 1.0


def test_every_range_contains_zero():
    observer = Observer(torch.Generator().manual_seed(0))
    observer(nn.Identity(), (torch.tensor([2.0, 3.0]),))
    assert observer.pop().low == 0.0


def test_an_input_mean_is_per_channel_of_a_convolution_and_of_a_linear():
    convolution, linear = InputMean(), InputMean()
    convolution(nn.Conv2d(2, 1, 1), (torch.tensor([[[[1.0, 3.0]], [[5.0, 7.0]]]]),))
    linear(nn.Linear(2, 1), (torch.tensor([[1.0, 5.0], [3.0, 7.0]]),))
    assert convolution.value().tolist() == linear.value().tolist() == [2.0, 6.0]


def test_batches_have_equal_weight():
    mean = InputMean()
    for value in (1.0, 4.0):
        mean(nn.Linear(1, 1), (torch.tensor([[value]]),))
    assert mean.value().tolist() == [2.5]


def test_extremes_contain_zero_and_are_reset():
    extremes = MinMaxObserver()
    extremes(nn.Identity(), (torch.tensor([2.0, 3.0]),))
    extremes(nn.Identity(), (torch.tensor([1.0, 5.0]),))
    assert extremes.pop() == (0.0, 5.0)
    assert extremes.pop() == (0.0, 0.0)
