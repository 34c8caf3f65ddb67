import pytest
import torch

from calibration.data.observation import ActivationSamples
from calibration.recipes.percentile import RECIPE
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.errors import InputError


def test_the_tails_are_clipped_at_both_ends():
    values = torch.arange(1001.0) - 500
    values[0], values[-1] = -1e6, 1e6
    chosen = RECIPE(percentile=90.0).activation_range(ActivationSamples(values, -1e6, 1e6), LayerSpec(8, 8, symmetric=True))
    assert chosen.scale * 127 == pytest.approx(450, rel=0.01)


def test_all_of_the_values_are_kept_at_one_hundred_percent():
    chosen = RECIPE(percentile=100.0).activation_range(
        ActivationSamples(torch.tensor([-3.0, 12.0]), -3.0, 12.0), LayerSpec(4, 4, symmetric=False)
    )
    assert (chosen.scale, chosen.qmin) == (pytest.approx(1.0), -3)


@pytest.mark.parametrize("percentile", [49.0, 100.5])
def test_a_share_outside_its_range_is_refused(percentile):
    with pytest.raises(InputError, match="percentile"):
        RECIPE(percentile=percentile)
