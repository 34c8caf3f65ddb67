"""What holds for every recipe that the folder has: a valid artifact that the reference runs, whatever the family and the bits."""

import functools
import signal
from dataclasses import fields

import pytest

import calibration
from calibration import recipes
from calibration.run.options import Interrupted, RunOptions
from edm_deploy import Artifact, registry
from edm_deploy.artifact.reference import Reference
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.pipelines.source import load_source
from tests.conftest import TINY, tiny_inputs

NAMES = registry.names(recipes)
# Every recipe on two kinds of model, and every kind on one that trains, which calibrates first; the full product is `extended`. What a recipe that
# reconstructs needs of a kind is that its blocks hold every site once (`tests/calibration/reconstruction/test_blocks.py`).
USUAL_KINDS = ("unet2d", "sd3")
USUAL_RECIPES = ("efficientdm",)
MODELS_AND_RECIPES = [
    pytest.param(kind, name, marks=[] if kind in USUAL_KINDS or name in USUAL_RECIPES else [pytest.mark.extended])
    for kind in TINY
    for name in NAMES
]
# Weight and activation bits; every recipe with one below 4 bits, of another width on either side, and mse with the kinds of the others.
BITS = [(2, 3), (3, 5), (3, 8), (5, 6), (6, 7), (8, 8), (4, 16)]
MSE_BITS = [(3, 8), (8, 8), (4, 16)]
BITS_AND_RECIPES = [
    pytest.param(*bits, name, marks=[] if bits == (2, 3) or (name == "mse" and bits in MSE_BITS) else [pytest.mark.extended])
    for bits in BITS
    for name in NAMES
]


def quick(name, **settings):
    """The recipe with every count of work at its smallest."""
    recipe = registry.load(recipes, name, "RECIPE")
    small = {"rows": 3, "calibration_samples": 2, "steps": 2, "batch": 2}
    known = {field.name for field in fields(recipe)}
    return recipe(**{key: value for key, value in (small | settings).items() if key in known})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from diffusers import DDIMPipeline

    from tests.conftest import FLOW_SCHEDULER, SCHEDULER, tiny_model

    @functools.cache  # a fit leaves its source as it is
    def load(kind):
        path = tmp_path_factory.mktemp(kind)
        family, _, model = tiny_model(kind)
        config = FLOW_SCHEDULER if family.flow else SCHEDULER
        DDIMPipeline(model, scheduler_from_config(config["_class_name"], config)).save_pretrained(path)
        return load_source(path)

    return load


@pytest.fixture(scope="module")
def fitted(source):
    """The artifact of a recipe at W4A4 on a kind of model, each made once."""
    return functools.cache(lambda kind, name: calibration.fit(source(kind), quick(name, weight_bits=4, act_bits=4), RunOptions()))


@pytest.mark.parametrize(("kind", "name"), MODELS_AND_RECIPES)
def test_a_recipe_ends_in_an_artifact_that_the_reference_runs(kind, name, fitted, tmp_path):
    artifact = fitted(kind, name)
    loaded = Artifact.load(artifact.save(tmp_path / "a"))
    assert loaded.digest == artifact.digest
    assert loaded.scheme == "W4A4"
    assert loaded.provenance["recipe"] == name == quick(name).name
    assert loaded.provenance["settings"]["rows"] == 3
    assert loaded.provenance["peak_memory_bytes"] > 1e6
    assert Reference(loaded)(tiny_inputs(kind)).isfinite().all()


@pytest.mark.parametrize(("weight_bits", "act_bits", "name"), BITS_AND_RECIPES)
def test_any_bits_are_kept_to(weight_bits, act_bits, name, source):
    artifact = calibration.fit(source("unet2d"), quick(name, weight_bits=weight_bits, act_bits=act_bits), RunOptions())
    artifact.validate()
    family = artifact.family_object
    for site_name, site in artifact.sites.items():
        kept = family.placement(site_name) == "w8a8"
        # Weight-only leaves every input in floating point, those of the kept layers too.
        assert site.scheme == f"W{8 if kept else weight_bits}A{8 if kept and act_bits < 16 else act_bits}"


@pytest.mark.parametrize("name", [name for name in NAMES if not quick(name).trains])  # those that train: resumed, below
def test_the_same_settings_give_the_same_artifact(name, source, fitted):
    again = calibration.fit(source("unet2d"), quick(name, weight_bits=4, act_bits=4), RunOptions())
    assert again.digest == fitted("unet2d", name).digest


@pytest.mark.parametrize("name", [name for name in NAMES if quick(name).trains])
def test_one_that_trains_can_be_interrupted_and_resumed(name, source, fitted, tmp_path):
    model, recipe, steps = source("unet2d"), quick(name, weight_bits=4, act_bits=4), []

    def interrupt(progress):
        if progress.stage in ("finetune", "reconstruct"):
            steps.append(progress.step)
            if len(steps) == (1 if progress.stage == "finetune" else 4):  # the middle of a run of two steps; of the second block
                signal.raise_signal(signal.SIGINT)

    whole = fitted("unet2d", name)
    with pytest.raises(Interrupted):
        calibration.fit(model, recipe, RunOptions(checkpoint=tmp_path / "ck"), on_progress=interrupt)
    resumed = calibration.fit(model, recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True))
    assert resumed.digest == whole.digest
    measured = ("wall_seconds", "peak_memory_bytes")
    told = [{key: value for key, value in one.provenance.items() if key not in measured} for one in (whole, resumed)]
    assert told[0] == told[1], "what the notes say is in the checkpoint too"


@pytest.mark.parametrize("name", NAMES)
def test_the_default_settings_are_valid_and_documented(name):
    recipe = registry.load(recipes, name, "RECIPE")
    recipe()
    documented = "".join(cls.__doc__ or "" for cls in recipe.__mro__)
    assert [field.name for field in fields(recipe) if f"{field.name}" not in documented] == []
