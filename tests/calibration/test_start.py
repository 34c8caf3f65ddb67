"""A recipe that starts from an artifact, end to end; what the student takes from it is in student/test_from_artifact.py."""

import signal
from dataclasses import replace

import pytest
import torch

from calibration import Interrupted, RunOptions, fit, recipes
from calibration.passes.adp import Adp
from calibration.recipes.efficientdm import EfficientDM
from calibration.recipes.mse import Mse
from calibration.recipes.qat import QAT
from calibration.recipes.qdiff import QDiff
from calibration.start import recipe_taking
from edm_deploy import registry
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.errors import InputError
from tests.calibration.tiny import tiny_source

SMALL = {"rows": 3, "calibration_samples": 3, "batch": 3}
STILL = {"scale_rate": 0.0, "bound_rate": 0.0, "weight_scale_rate": 0.0}


@pytest.fixture(scope="module")
def rounded():
    """AdaRound of a tiny UNet, with split shortcuts."""
    recipe = QDiff(**SMALL | {"batch": 2}, steps=4, rounding_rate=0.1, act_bits=4)
    return fit(tiny_source(), recipe, RunOptions())


def test_what_does_not_train_ends_in_the_artifact_that_it_started_from(rounded):
    recipe = QAT(**SMALL, **STILL, steps=1, weight_rate=1e-30)
    again = fit(tiny_source(), recipe, RunOptions(), start=rounded)
    assert all(torch.equal(again.sites[name].codes, site.codes) for name, site in rounded.sites.items())
    assert again.structure == rounded.structure
    chain = again.provenance["started_from"]
    assert [(step["digest"], step["recipe"]) for step in chain] == [(rounded.digest, "qdiff")]
    third = fit(tiny_source(), recipe, RunOptions(), start=again)
    assert [step["recipe"] for step in third.provenance["started_from"]] == ["qdiff", "qat"]


def test_training_continues_from_the_artifact_and_an_interrupted_run_is_resumed(rounded, tmp_path):
    recipe = EfficientDM(**SMALL, steps=4, rank=2, update_rate=0.05)
    whole = fit(tiny_source(), recipe, RunOptions(), start=rounded)
    moved = [name for name, site in rounded.sites.items() if not torch.equal(whole.sites[name].codes, site.codes)]
    assert moved

    def interrupt(progress):
        if progress.stage == "finetune" and progress.step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck"), start=rounded, on_progress=interrupt)
    resumed = fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True), start=rounded)
    assert resumed.digest == whole.digest


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ("dilate", "quest") else [pytest.mark.extended]) for name in registry.names(recipes)]
)
def test_every_recipe_starts_from_an_artifact_or_says_that_it_cannot(name, rounded):
    recipe_class = registry.load(recipes, name, "RECIPE")
    recipe = recipe_taking(
        recipe_class(**{key: 2 for key in ("calibration_samples", "steps", "batch") if hasattr(recipe_class, key)}), rounded
    )
    if not recipe_class.starts_from_artifact:
        with pytest.raises(InputError, match=f"Recipe '{name}' calibrates anew"):
            fit(tiny_source(), recipe, RunOptions(), start=rounded)
        return
    found = fit(tiny_source(), recipe, RunOptions(), start=rounded)
    assert found.structure == rounded.structure  # no recipe rewrites it again
    assert found.provenance["recipe"] == name


def test_a_recipe_takes_bits_and_rows_unless_the_user_chose_others(rounded):
    taken = recipe_taking(EfficientDM(), rounded, ["seed"])
    assert (taken.weight_bits, taken.act_bits, taken.rows) == (4, 4, 3)
    with pytest.raises(InputError, match=r"rows is 50, and the artifact to start from has 3, which does not change\. Leave rows out"):
        recipe_taking(EfficientDM(rows=50), rounded, ["rows"])


def with_correction(artifact):
    ones = torch.ones(1, 3)
    rows = torch.zeros(artifact.num_train_timesteps, dtype=torch.int32)
    return replace(artifact, correction=Correction(row_of_timestep=rows, scale=ones, input_bias=ones - 1))


def with_folded(artifact):
    return replace(artifact, provenance=artifact.provenance | {"folded_pre_scales": "3 of 9"})


@pytest.mark.parametrize(
    ("change", "recipe", "options", "passes", "message"),
    [
        (
            lambda a: replace(a, provenance=a.provenance | {"teacher_sha256": "0" * 64}),
            QAT(),
            {},
            [],
            r"made of another model \(000000000000, this one is",
        ),
        (lambda a: replace(a, provenance={}), QAT(), {}, [], "made of another model"),
        (lambda a: replace(a, sites={}), QAT(), {}, [], "has no quantized layers"),
        (lambda a: a, Mse(weight_bits=4, act_bits=4), {}, [], "Recipe 'mse' calibrates anew"),
        (lambda a: a, QAT(weight_bits=8), {}, [], "weight_bits is 8, and the artifact to start from has 4"),
        (with_correction, QAT(), {}, [], "made with pass tac, whose correction belongs"),
        (lambda a: a, QAT(), {}, [Adp(groups=2)], "Pass 'adp' works on calibration"),
        (lambda a: a, QAT(), {"fold_time": True}, [], "--fold-time: the artifact to start from quantizes"),
        (with_folded, QDiff(partition="layer"), {}, [], "Set partition=block"),
    ],
)
def test_an_artifact_that_does_not_fit_is_refused_before_any_work(change, recipe, options, passes, message, rounded):
    seen = []
    recipe = replace(recipe, rows=3, **({"act_bits": 4} if isinstance(recipe, QDiff) else {}))
    with pytest.raises(InputError, match=message):
        fit(tiny_source(), recipe, RunOptions(**options), passes=passes, start=change(rounded), on_progress=seen.append)
    assert not seen
