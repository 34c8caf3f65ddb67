from dataclasses import fields

import pytest

from calibration import passes, recipes
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.minmax import MinMax
from calibration.recipes.percentile import Percentile
from calibration.student.quantization_spec import LayerSpec
from edm_deploy import registry
from edm_deploy.errors import InputError


@pytest.mark.parametrize(
    ("made", "settings", "message"),
    [
        (MinMax, {"weight_bits": 9}, "weight_bits is 9; expected 2 to 8"),
        (MinMax, {"act_bits": 2}, "act_bits is 2; expected 3 to 8, or 16"),
        (MinMax, {"rows": 0}, "rows is 0; expected at least 1"),
        (MinMax, {"seed": -1}, "seed is -1; expected an integer from 0 to 9223372036854775807"),
        (MinMax, {"seed": 12345678901234567890}, "seed is 12345678901234567890; expected an integer"),
        (MinMax, {"eta": 1.5}, "eta is 1.5; expected 0.0 to 1.0"),
        (MinMax, {"calibration_samples": 0}, "calibration_samples is 0"),
        (Percentile, {"percentile": 10.0}, "percentile is 10.0; expected 50.0 to 100.0"),
        (EfficientDM, {"steps": 0}, "steps is 0; expected at least 1"),
        (EfficientDM, {"update_rate": -1.0}, "update_rate is -1.0; expected at least 0"),
        (EfficientDM, {"update_rate": float("nan")}, "update_rate is nan"),
        (EfficientDM, {"warmup": 2.0}, "warmup is 2.0; expected 0.0 to 1.0"),
        (EfficientDM, {"scale_rate": float("inf")}, "scale_rate is inf; expected a finite number"),
        (EfficientDM, {"compute": "fp8"}, "compute is 'fp8'; expected fp32 or bf16"),
    ],
)
def test_a_setting_outside_its_range_is_refused_with_what_was_expected(made, settings, message):
    with pytest.raises(InputError, match=message):
        made(**settings)


CLASSES = [registry.load(recipes, name, "RECIPE") for name in registry.names(recipes)]
CLASSES += [registry.load(passes, name, "PASS") for name in registry.names(passes)]
NUMBERS = [(made, field.name) for made in CLASSES for field in fields(made) if "int" in str(field.type) or "float" in str(field.type)]


@pytest.mark.parametrize(("made", "name"), NUMBERS, ids=lambda value: getattr(value, "name", value))
def test_no_number_may_be_negative_or_not_finite(made, name):
    for value in (-1, float("inf"), float("-inf"), float("nan")):
        with pytest.raises(InputError, match=f"{name} is {value}; expected"):
            made(**{name: value})


def test_kept_sites_are_w8a8_and_symmetric_whatever_the_bits():
    assert EfficientDM(weight_bits=2, act_bits=3).layer_spec("conv_in", "w8a8") == LayerSpec(8, 8, symmetric=True)


def test_published_constants_are_the_defaults():
    recipe = EfficientDM()
    assert (recipe.rows, recipe.rank, recipe.steps, recipe.update_rate, recipe.scale_rate) == (100, 32, 16000, 1 / 2500, 5e-4)


@pytest.mark.parametrize("name", registry.names(recipes))
def test_a_recipe_trains_exactly_if_it_has_steps(name):
    recipe = registry.load(recipes, name, "RECIPE")
    assert recipe.trains == ("steps" in {field.name for field in fields(recipe)})


def test_symmetric_bounds_below_eight_bit_are_a_setting():
    assert not MinMax(act_bits=4).layer_spec("x", "quantize").symmetric
    assert MinMax(act_bits=4, symmetric=True).layer_spec("x", "quantize").symmetric
