import pytest
import torch

from calibration import RunOptions, fit
from calibration.recipes.qdiff import RECIPE
from edm_deploy.errors import InputError
from edm_deploy.network.restructure import PUBLISHED
from tests.calibration.tiny import tiny_source

SMALL = {"rows": 3, "calibration_samples": 2, "steps": 4, "batch": 2, "scale_rate": 1e-4}


@pytest.fixture(scope="module")
def artifact():
    return fit(tiny_source(), RECIPE(**SMALL, weight_bits=4, act_bits=4), RunOptions())


def test_one_scale_serves_all_timesteps_after_training_too(artifact):
    assert len(artifact.timesteps) == 3
    assert all(site.activation.is_constant for site in artifact.sites.values())


def test_shortcuts_are_split_where_their_parts_meet(artifact):
    assert artifact.structure.segments == {
        "up_blocks.0.resnets.0.conv_shortcut": (16, 16),
        "up_blocks.0.resnets.1.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.0.conv_shortcut": (16, 8),
        "up_blocks.1.resnets.1.conv_shortcut": (8, 8),
    }
    first, second = (artifact.sites[f"up_blocks.0.resnets.1.conv_shortcut.segment{part}"] for part in range(2))
    assert (first.codes.shape[1], second.codes.shape[1]) == (16, 8)
    assert not torch.equal(first.activation.scale, second.activation.scale)


def test_all_splits_the_layers_behind_the_norms_too_and_none_splits_nothing():
    source = tiny_source()
    assert len(RECIPE(split="all").structure(source).segments) == 8
    assert RECIPE(split="none").structure(source) == PUBLISHED


def test_a_linear_layer_on_a_concatenation_is_no_shortcut():
    source = tiny_source("flux")
    assert RECIPE().structure(source) == PUBLISHED
    assert list(RECIPE(split="all").structure(source).segments) == ["single_transformer_blocks.0.proj_out"]


def test_the_published_constants_are_the_defaults():
    recipe = RECIPE()
    assert (recipe.weight_bits, recipe.act_bits, recipe.rows, recipe.calibration_samples) == (4, 8, 20, 256)
    assert (recipe.steps, recipe.scale_rate, recipe.split, recipe.static) == (20000, 4e-4, "shortcut", True)


@pytest.mark.parametrize("setting", [{"split": "half"}, {"scale_rate": -1.0}], ids=str)
def test_a_setting_outside_its_range_is_refused(setting):
    with pytest.raises(InputError, match=next(iter(setting))):
        RECIPE(**setting)
