import tomllib
from pathlib import Path

import pytest

import calibration
from calibration import recipes
from edm_deploy import registry

PRESETS = sorted((Path(calibration.__file__).parent / "presets").glob("*.toml"))


def preset(path):
    """The recipe that a shipped preset is for, with its settings: `demo-RECIPE`, and `demo` is efficientdm's."""
    name = path.stem.partition("-")[2] or "efficientdm"
    return registry.load(recipes, name, "RECIPE")(**tomllib.loads(path.read_text()))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_is_settings_of_its_recipe(path):
    assert preset(path).weight_bits == 4


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_the_demos_pools_hold_every_row_equally_often(path):
    recipe = preset(path)
    assert recipe.calibration_samples % recipe.rows == 0


@pytest.mark.parametrize("name", ["demo", "demo-qat", "demo-quest", "demo-mpq-dm"])
def test_the_batches_of_those_that_train_the_whole_network_do_too(name):
    recipe = preset(next(path for path in PRESETS if path.stem == name))
    assert recipe.batch % recipe.rows == 0
