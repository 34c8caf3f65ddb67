from dataclasses import fields

import pytest
import torch

from calibration import recipes
from calibration.recipes._distilling import DistillationRecipe
from calibration.recipes.efficientdm import EfficientDM
from edm_deploy import registry
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from tests.calibration.tiny import tiny_source


def test_the_recipes_that_train_against_the_prediction_share_their_settings():
    found = {name for name in registry.names(recipes) if issubclass(registry.load(recipes, name, "RECIPE"), DistillationRecipe)}
    assert found == {"efficientdm", "mpq-dm", "qat", "quest"}


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("steps", 0),
        ("batch", 0),
        *((name, -1.0) for name in ("scale_rate", "bound_rate", "warmup", "relative", "scale_rates_to")),
        ("compute", "fp8"),
        ("ema", 1.0),
        ("ema", -0.1),
        ("decay", "steps"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting, value):
    assert setting in {field.name for field in fields(DistillationRecipe)}
    with pytest.raises(InputError, match=setting):
        EfficientDM(**{setting: value})


def test_the_pool_holds_at_least_one_batch():
    assert EfficientDM(calibration_samples=2, batch=6).pool_size() == 6
    assert EfficientDM(calibration_samples=8, batch=6).pool_size() == 8


def test_fixed_bounds_are_not_trained():
    source = tiny_source()
    recipe = EfficientDM(rows=2, act_bits=4)
    student = recipe.student(source, calibrated_timesteps(source.scheduler, 2), torch.device("cpu"))
    scales, bounds = recipe.table_groups(student)
    assert len(scales.parameters) == len(student.quantizers) > len(bounds.parameters) > 0  # the kept 8-bit layers are symmetric
    assert all(parameter.requires_grad for parameter in bounds.parameters)
