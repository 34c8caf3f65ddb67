import tomllib
from pathlib import Path

import pytest

import calibration
from calibration.recipes.efficientdm import EfficientDM

PRESETS = sorted((Path(calibration.__file__).parent / "presets").glob("*.toml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_settings_of_the_fine_tuning_recipe(path):
    assert EfficientDM(**tomllib.loads(path.read_text()))


def test_the_demos_batches_hold_every_row_equally_often():
    recipe = EfficientDM(**tomllib.loads(next(path for path in PRESETS if path.stem == "demo").read_text()))
    assert recipe.calibration_samples % recipe.rows == 0
    assert recipe.batch % recipe.rows == 0
