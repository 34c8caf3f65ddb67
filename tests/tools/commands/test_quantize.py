from __future__ import annotations

import inspect
import re

import pytest

from calibration import recipes
from edm_deploy import registry
from edm_deploy_tools.commands.quantize import calibrate, finetune


@pytest.mark.parametrize(("command", "training"), [(calibrate, False), (finetune, True)])
def test_the_help_of_each_command_names_its_recipes(command, training):
    helped = inspect.signature(command, eval_str=True).parameters["recipe"].annotation.__metadata__[0].help.partition(":")[2]
    own = {name for name in registry.names(recipes) if registry.load(recipes, name, "RECIPE").trains == training}
    assert set(re.findall(r"[a-z-]+", helped)) - {"or"} == own


@pytest.mark.parametrize("time", ["10", "0s", "often"])
def test_a_time_between_checkpoints_without_a_unit_or_of_nothing_is_refused(run, tmp_path, time):
    complaint = run("finetune", "./nothing", "--out", tmp_path / "tuned", "--checkpoint-every", time).complaint
    assert f"--checkpoint-every '{time}': expected a duration above 0 such as 30s, 5m or 1h" in complaint


def test_finetune_writes_an_artifact_of_four_bits(run, chain, tmp_path):
    small = ("--rows", 2, "--set", "steps=2", "--set", "batch=2", "--set", "calibration_samples=2", "--set", "rank=2")
    ran = run("finetune", chain.model, "--out", tmp_path / "tuned", "--for", "openvino", "--checkpoint-every", "0.01s", *small)
    assert ran.code == 0, ran.err
    assert "W4A4" in ran.out
    assert (tmp_path / "tuned" / "artifact.json").is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["allocate.budget=0.75"], "pass allocate: budget is 0.75 (float), expected a string"),
        (["allocate.budget=int4=75"], "allocate.budget int4 is 75.0; expected 0.0 to 1.0"),
        (["allocate.budget=int4=0.999"], "No allocation meets allocate.budget int4=0.999. Set allocate.budget=int4=0."),
        (["allocate.budget=time=0.1x"], "No allocation meets allocate.budget time=0.1x. Set allocate.budget=time=0."),
        (["allocate.budget=time=0.9x", "allocate.gpu=rtx1"], "rtx1"),
    ],
)
def test_a_budget_that_no_allocation_meets_is_one_line_with_the_nearest_that_one_does(run, chain, tmp_path, settings, message):
    chosen = [part for setting in settings for part in ("--set", setting)]
    ran = run("calibrate", chain.model, "--out", tmp_path / "a", "--weight-bits", 4, "--act-bits", 4, "--with", "allocate", *chosen)
    assert ran.code == 2
    assert message in ran.complaint
    assert not (tmp_path / "a").exists()
