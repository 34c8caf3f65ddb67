import pytest
import torch

from calibration.data.observation import ActivationSamples
from calibration.recipes.minmax import RECIPE
from calibration.student.quantization_spec import LayerSpec


def test_the_range_spans_all_observed_values_including_outliers():
    observed = ActivationSamples(torch.tensor([-1.0, 0.0, 1.0]), low=-3.0, high=12.0)
    chosen = RECIPE().activation_range(observed, LayerSpec(4, 4, symmetric=False))
    assert (chosen.scale, chosen.qmin) == (pytest.approx(1.0), -3)


def test_the_largest_weight_of_a_channel_gets_the_largest_code():
    weight = torch.tensor([[0.7, -0.1], [0.0, -3.5]])
    assert RECIPE().weight_scale(weight, 4).tolist() == pytest.approx([0.1, 0.5], rel=0.15)
