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
