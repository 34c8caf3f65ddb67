import pytest
import torch

from calibration.data.observation import ActivationSamples
from calibration.recipes import minmax, mse
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.errors import InputError


def test_one_outlier_does_not_stretch_the_range():
    values = torch.cat([torch.randn(10000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    observed, spec = ActivationSamples(values, float(values.min()), 30.0), LayerSpec(4, 4, symmetric=False)
    assert mse.RECIPE().activation_range(observed, spec).scale < minmax.RECIPE().activation_range(observed, spec).scale / 2


def test_a_higher_exponent_clips_weights_less():
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    low, high = (mse.RECIPE(weight_exponent=exponent).weight_scale(weight, 4) for exponent in (1.0, 8.0))
    assert bool((low < high).all())


def test_an_exponent_below_one_is_refused():
    with pytest.raises(InputError, match="weight_exponent"):
        mse.RECIPE(weight_exponent=0.5)
