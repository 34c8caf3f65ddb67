from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from edm_deploy import registry
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy_tools.common.recipe_settings import checked, fits, parse_override, passes_with, recipe_with, sorted_overrides


@dataclass(frozen=True, kw_only=True)
class Toy:
    steps: int = 1
    rate: float = 0.5
    mode: Literal["fast", "exact"] = "fast"
    layers: tuple[int, ...] = ()
    note: str | None = None


def test_an_override_is_read_as_toml():
    assert parse_override("steps=600") == ("steps", 600)
    assert parse_override("rate = 1e-3") == ("rate", 1e-3)
    assert parse_override("symmetric=true") == ("symmetric", True)
    assert parse_override("update-rate=[1, 2]") == ("update_rate", [1, 2])


def test_an_override_that_is_no_toml_is_a_string():
    assert parse_override("compute=bf16") == ("compute", "bf16")


@pytest.mark.parametrize("text", ["steps", "=3", " = 3"])
def test_an_override_without_key_or_value_is_refused(text):
    with pytest.raises(InputError, match="expected key=value"):
        parse_override(text)


def test_later_sources_override_earlier_ones(tmp_path):
    config = tmp_path / "settings.toml"
    config.write_text("weight_bits = 5\nact_bits = 5\nrows = 5\n")
    recipe = recipe_with("efficientdm", preset="demo", config=config, flags={"act_bits": 6, "rows": None}, overrides=["rows=7"])
    assert (recipe.weight_bits, recipe.act_bits, recipe.rows) == (5, 6, 7)


def test_without_settings_the_published_defaults_stand():
    recipe = recipe_with("efficientdm")
    assert (recipe.weight_bits, recipe.act_bits) == (4, 4)
    assert recipe_with("mse").weight_bits == 8


def test_a_whole_number_passes_for_a_fraction_but_true_does_not():
    assert fits(1, float)
    assert not fits(True, float)
    assert not fits(True, int)
    assert not fits(1.5, int)


def test_values_become_what_the_field_holds():
    assert checked(Toy, {"rate": 1, "layers": [1, 2]}, where="--set") == {"rate": 1.0, "layers": (1, 2)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stesp": 3}, "Did you mean 'steps'"),
        ({"steps": "many"}, r"steps is 'many' \(str\), expected a whole number"),
        ({"rate": "high"}, "expected a number"),
        ({"mode": "slow"}, "expected one of 'fast', 'exact'"),
        ({"layers": ["a"]}, "expected a list"),
        ({"note": 3}, "expected a string"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_was_expected(settings, message):
    with pytest.raises(InputError, match=message):
        checked(Toy, settings, where="--set")


def test_an_option_that_a_recipe_has_not_is_named_as_typed():
    with pytest.raises(InputError, match="no setting --weight-bits"):
        checked(Toy, {"weight_bits": 4}, where="recipe toy", option=True)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(UnsupportedError, match="Known: demo"):
        recipe_with("mse", preset="dmo")


def test_a_broken_config_names_its_line(tmp_path):
    (tmp_path / "a.toml").write_text("rows = = 3")
    with pytest.raises(ArtifactError, match="line 1"):
        recipe_with("mse", config=tmp_path / "a.toml")


def test_overrides_of_passes_are_told_apart_by_their_dot():
    assert sorted_overrides(["steps=6", "tac.ridge=0.1", "relative=0.5"]) == (["steps=6", "relative=0.5"], ["tac.ridge=0.1"])


def test_a_pass_takes_its_settings_and_its_place():
    import calibration.passes

    names = registry.names(calibration.passes)
    assert [chosen.name for chosen in passes_with(names)] == names
    with pytest.raises(UnsupportedError, match=r"No pass 'tca' in calibration.passes. Did you mean 'tac'"):
        passes_with(["tca"])
    with pytest.raises(InputError, match="pass tac has no setting 'rigde'"):
        passes_with(["tac"], ["tac.rigde=1"])
    with pytest.raises(InputError, match=r"no pass 'tac' in this run. Add --with tac"):
        passes_with([], ["tac.ridge=1"])
