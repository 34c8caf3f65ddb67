"""Every recipe that the folder holds, met without anyone listing it."""

import pytest
import torch

import calibration.recipes
from calibration import RunOptions, fit
from edm_deploy import registry
from edm_deploy.artifact.reference import Reference
from tests.calibration.tiny import tiny_source
from tests.conftest import tiny_inputs

QUICK = {"steps": 2, "batch": 3, "rank": 2}


def recipe(name, **settings):
    made = registry.load(calibration.recipes, name, "RECIPE")
    quick = {key: value for key, value in QUICK.items() if key in made.__dataclass_fields__}
    return made(**{"rows": 3, "calibration_samples": 3} | quick | settings)


@pytest.mark.parametrize("kind", ["unet2d", "unet2d-classes", "unet2d-condition"])
@pytest.mark.parametrize("name", registry.names(calibration.recipes))
def test_a_recipe_ends_in_an_artifact_that_the_reference_runs(name, kind, tmp_path):
    made = recipe(name, weight_bits=4, act_bits=4)
    artifact = fit(tiny_source(kind), made, RunOptions())
    artifact.save(tmp_path / "artifact")
    assert artifact.scheme == "W4A4"
    assert artifact.provenance["recipe"] == name == made.name
    assert artifact.provenance["settings"]["rows"] == 3
    assert artifact.provenance["peak_memory_bytes"] > 1e6
    assert bool(torch.isfinite(Reference(artifact)(tiny_inputs(kind))).all())


@pytest.mark.parametrize(("weight_bits", "act_bits"), [(2, 3), (3, 5), (5, 6), (6, 7), (8, 8), (4, 16)])
@pytest.mark.parametrize("name", ["mse", "efficientdm"])
def test_any_bits_end_in_a_valid_artifact_of_these_bits(name, weight_bits, act_bits):
    artifact = fit(tiny_source(), recipe(name, weight_bits=weight_bits, act_bits=act_bits), RunOptions())
    assert artifact.scheme == f"W{weight_bits}A{act_bits}"


def test_progress_tells_how_far_it_is_and_what_it_takes():
    seen = []
    fit(tiny_source(), recipe("efficientdm"), RunOptions(), on_progress=seen.append)
    assert [(p.stage, p.step, p.total) for p in seen] == [("calibrate", n, 3) for n in (1, 2, 3)] + [("finetune", n, 2) for n in (1, 2)]
    assert seen[0].loss is None
    assert seen[-1].loss > 0
    assert seen[-1].eta_seconds == 0
    assert seen[-1].rate > 0
    assert seen[-1].memory_bytes > 1e6
