from __future__ import annotations

from pathlib import Path

import pytest

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.runtime.capabilities import CAPABILITIES
from edm_deploy_tools.comparison.grid import check_experiments, entries_of, experiments_of, presets_of, schemes_of
from tests.calibration.tiny import tiny_source


def experiments(recipes="static,efficientdm", bits="W4A4", presets=None, rows=4, seeds=1, budget=60.0):
    return experiments_of(entries_of(recipes, presets or {}), schemes_of(bits), rows=rows, seeds=seeds, budget=budget)


def test_all_is_every_recipe_without_passes():
    from calibration import recipes
    from edm_deploy import registry

    assert [entry.recipe for entry in entries_of("all", {})] == registry.names(recipes)


def test_an_entry_is_a_recipe_with_settings_and_passes():
    (entry,) = entries_of("static:calibrator=mse:tac.ridge=0.5+tac+adp", {})
    assert (entry.recipe, entry.settings, entry.passes) == ("static", ("calibrator=mse", "tac.ridge=0.5"), ("tac", "adp"))
    assert entry.label == "static:calibrator=mse:tac.ridge=0.5+tac+adp"


def test_a_shipped_short_preset_is_the_default_and_others_are_used_by_name():
    assert [entry.preset for entry in entries_of("efficientdm,qat,mse", {})] == ["demo", "demo-qat", None]
    assert entries_of("qat", {"qat": "published"})[0].preset is None
    (entry,) = entries_of("qat", {"qat": "mine.toml"})
    assert (entry.preset, entry.config) == (None, Path("mine.toml"))


def test_recipes_that_do_not_train_run_once_without_a_budget():
    made = experiments(bits="W8A8,W4A4", seeds=3)
    assert [(cell.scheme, cell.entry.recipe, cell.seed, cell.budget) for cell in made] == [
        (scheme, recipe, seed, budget)
        for scheme in ("W8A8", "W4A4")
        for recipe, seed, budget in [("static", 0, None), *(("efficientdm", seed, 60.0) for seed in range(3))]
    ]
    assert len({cell.folder for cell in made}) == len(made)
    assert all(cell.recipe.rows == 4 and cell.recipe.seed == cell.seed for cell in made)


def test_the_command_has_all_settings():
    (cell,) = experiments("efficientdm:rank=2:tac.ridge=0.5+tac", bits="W4A8")
    words = " ".join(cell.command("model", Path("out")))
    assert (
        "finetune model --out out --recipe efficientdm --rows 4 --seed 0 --weight-bits 4 --act-bits 8 --preset demo --budget 60.0s" in words
    )
    assert words.endswith("--set rank=2 --set tac.ridge=0.5 --with tac")
    assert " calibrate " in " ".join(experiments("static")[0].command("model", Path("out")))


def test_the_identity_has_everything_that_determines_the_artifact():
    (one,), (other,) = experiments("efficientdm"), experiments("efficientdm", budget=61.0)
    assert one.identity("a") == experiments("efficientdm")[0].identity("a")
    assert one.identity("a") != one.identity("b")
    assert one.identity("a") != other.identity("a")
    assert one.identity("a") != one.identity("a", ["a car"]) != one.identity("a", ["a cat"])
    assert one.identity("a") != experiments("efficientdm+tac")[0].identity("a")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recipes": "mse,effcientdm"}, "Did you mean 'efficientdm'"),
        ({"recipes": " , "}, "names none"),
        ({"recipes": "mse,mse"}, "names 'mse' twice"),
        ({"recipes": "mse+tca"}, "No pass 'tca'"),
        ({"recipes": "mse+tac+tac"}, "given twice"),
        ({"recipes": "mse:stepz=3"}, "no setting 'stepz'"),
        ({"recipes": "efficientdm", "presets": {"efficientdm": "demi"}}, "No preset 'demi'"),
        ({"recipes": "mse", "presets": {"qat": "demo-qat"}}, "qat is not among --recipes"),
        ({"bits": "W4"}, "expected schemes separated by commas"),
        ({"bits": "W4A4,"}, "expected schemes separated by commas"),
        ({"bits": "W9A4"}, "weight_bits is 9"),
        ({"seeds": 0}, "--seeds 0: expected 1 or more"),
    ],
)
def test_an_invalid_comparison_is_refused_before_anything_runs(given, message):
    with pytest.raises((InputError, UnsupportedError), match=message):
        experiments(**given)


def test_presets_are_parsed_by_recipe():
    assert presets_of(["mpq_dm=mine.toml"]) == {"mpq-dm": "mine.toml"}
    with pytest.raises(InputError, match="expected recipe=name"):
        presets_of(["demo"])


def test_a_budget_below_the_forward_passes_of_calibration_is_refused():
    # The demo's 80 samples at 4 rows, at a second for 16: 20 s.
    with pytest.raises(InputError, match=r"--budget 15s is too small for efficientdm.*about 20 s"):
        check_experiments(experiments(budget=15.0), tiny_source(), [], forward_seconds=1.0, batch=16)
    check_experiments(experiments(budget=25.0), tiny_source(), [], forward_seconds=1.0, batch=16)


def test_a_scheme_that_the_backend_does_not_support_is_refused_with_the_nearest():
    target = next(target for target in CAPABILITIES.values() if not target.weight_only)
    with pytest.raises(UnsupportedError, match=r"W4A16 cannot be carried by .*Nearest: W4A8"):
        check_experiments(experiments("static", bits="W4A16"), tiny_source(), [target], forward_seconds=0.1, batch=1)


def test_a_recipe_that_does_not_support_the_model_is_refused_by_name(monkeypatch):
    def refuse(self, source):
        raise UnsupportedError("It has no labels.")

    from calibration.recipes.static import Static

    monkeypatch.setattr(Static, "structure", refuse)
    with pytest.raises(UnsupportedError, match="static cannot quantize unet2d: It has no labels"):
        check_experiments(experiments("static"), tiny_source(), [], forward_seconds=0.1, batch=1)
