from dataclasses import replace

import pytest
import torch

from calibration.data.observation import ActivationSamples
from calibration.recipes import minmax, mse
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.errors import InputError


def test_one_outlier_does_not_stretch_the_range():
    values = torch.cat([torch.randn(10000, generator=torch.Generator().manual_seed(0)), torch.tensor([30.0])])
    observed, spec = ActivationSamples(values, float(values.min()), 30.0, feature_map=True), LayerSpec(4, 4, symmetric=False)
    widest = minmax.RECIPE().activation_range(observed, spec).scale
    assert mse.RECIPE(clip_weight=1.0).activation_range(observed, spec).scale < widest / 2
    assert mse.RECIPE().activation_range(observed, spec).scale < 0.7 * widest


def test_clipped_values_of_feature_maps_weigh_more_than_those_of_tokens():
    values, spec = torch.randn(10000, generator=torch.Generator().manual_seed(0)), LayerSpec(4, 4, symmetric=False)
    tokens = ActivationSamples(values, float(values.min()), float(values.max()))
    plain, default = mse.RECIPE(clip_weight=1.0), mse.RECIPE()
    assert default.activation_range(tokens, spec) == plain.activation_range(tokens, spec)
    assert default.activation_range(replace(tokens, feature_map=True), spec).scale > plain.activation_range(tokens, spec).scale


def test_a_higher_exponent_clips_weights_less():
    weight = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    low, high = (mse.RECIPE(weight_exponent=exponent).weight_scale(weight, 4) for exponent in (1.0, 8.0))
    assert bool((low < high).all())


def test_an_exponent_below_one_is_refused():
    with pytest.raises(InputError, match="weight_exponent"):
        mse.RECIPE(weight_exponent=0.5)
