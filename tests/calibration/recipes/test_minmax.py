import pytest
import torch

from calibration.observe import Observation
from calibration.recipe import SiteSpec
from calibration.recipes.minmax import RECIPE


def test_the_range_is_what_was_seen_outliers_and_all():
    observed = Observation(torch.tensor([-1.0, 0.0, 1.0]), low=-3.0, high=12.0)
    chosen = RECIPE().activation_range(observed, SiteSpec(4, 4, symmetric=False))
    assert (chosen.scale, chosen.qmin) == (pytest.approx(1.0), -3)


def test_the_largest_weight_of_a_channel_gets_the_largest_code():
    weight = torch.tensor([[0.7, -0.1], [0.0, -3.5]])
    assert RECIPE().weight_scale(weight, 4).tolist() == pytest.approx([0.1, 0.5], rel=0.15)
