from __future__ import annotations

import inspect
import re

import pytest
import torch

from calibration import recipes
from edm_deploy import Artifact, registry
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


def test_finetune_continues_from_an_artifact(run, chain, tmp_path):
    small = ("--set", "steps=1", "--set", "batch=2", "--set", "calibration_samples=2", "--set", "rank=2")
    ran = run("finetune", chain.model, "--from", chain.artifact, "--out", tmp_path / "tuned", *small)
    assert ran.code == 0, ran.err
    before, after = (Artifact.load(path) for path in (chain.artifact, tmp_path / "tuned"))
    assert torch.equal(after.timesteps, before.timesteps)  # not the 100 rows of the recipe's default
    assert {name: site.scheme for name, site in after.sites.items()} == {name: site.scheme for name, site in before.sites.items()}
    assert [step["digest"] for step in after.provenance["started_from"]] == [before.digest]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{model}", "--from", "{artifact}", "--rows", 7), r"rows is 7, and the artifact to start from has \d+, which does not change"),
        (("{model}", "--from", "{artifact}", "--set", "weight_bits=3"), "weight_bits is 3, and the artifact to start from has"),
        (("{artifact}", "--from", "{artifact}"), "is an artifact, and --from names"),
        (("{model}", "--from", "{model}"), "artifact.json"),
    ],
)
def test_an_artifact_that_cannot_be_started_from_is_one_line_and_code_2(run, chain, tmp_path, arguments, message):
    filled = [str(argument).format(model=chain.model, artifact=chain.artifact) for argument in arguments]
    ran = run("finetune", *filled, "--out", tmp_path / "tuned")
    assert ran.code == 2
    assert re.search(message, ran.complaint), ran.complaint
    assert not (tmp_path / "tuned").exists()


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
