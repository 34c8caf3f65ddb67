from __future__ import annotations

import inspect
import re
import signal
import subprocess
import sys

import psutil
import pytest
import torch

from calibration import recipes
from calibration.data import preview
from edm_deploy import Artifact, registry
from edm_deploy_tools.cli import main
from edm_deploy_tools.commands.quantize import calibrate, finetune
from tests.processes import in_processes


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


SMALL = ("--rows", "2", "--set", "steps=400", "--set", "batch=2", "--set", "calibration_samples=2", "--set", "rank=2")


def test_two_processes_write_one_artifact(chain, tmp_path, monkeypatch):
    monkeypatch.setattr(preview, "STEPS", 2)
    command = ["finetune", str(chain.model), "--out", str(tmp_path / "tuned"), *SMALL, "--set", "steps=2", "--processes", "2"]
    command += ["--gradient-checkpointing", "--mixed-precision", "bf16", "--report-to", "tensorboard"]
    assert in_processes(2, lambda processes: main(command), tmp_path) == [0, 0]
    artifact = Artifact.load(tmp_path / "tuned")
    assert artifact.provenance["processes"] == 2
    assert (artifact.provenance["teacher_dtype"], artifact.provenance["settings"]["compute"]) == ("bf16-autocast", "bf16")
    assert len(list((tmp_path / "tuned.tensorboard").iterdir())) == 1  # of process 0
    assert not (tmp_path / "tuned.checkpoint").exists()


@pytest.mark.extended
def test_a_killed_process_ends_the_run_with_a_checkpoint_that_one_process_resumes(chain, tmp_path):
    command = [sys.executable, "-m", "edm_deploy_tools", "finetune", str(chain.model), "--out", str(tmp_path / "tuned"), *SMALL]
    run = subprocess.Popen([*command, "--processes", "2"], stderr=subprocess.PIPE, text=True)
    while not (line := run.stderr.readline()).startswith("finetune"):
        assert line, "the run ended before it trained"
    for child in psutil.Process(run.pid).children():
        if child.environ()["RANK"] == "1":
            child.kill()
    error = run.stderr.read().splitlines()[-1]
    assert run.wait() == 2
    assert re.search(r"^Error: Process 1 of 2 was ended by SIGKILL\. This run lost a process after step \d+ of 400; the state is in", error)
    assert (
        main([*command[3:], "--resume", "--set", "steps=401"]) == 2
    )  # the settings are those of the run, whatever the number of processes
    resumed = subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True)
    assert not resumed.stderr.readline().startswith("calibrate")
    resumed.send_signal(signal.SIGINT)
    assert re.search(r"Interrupted after step \d+ of 400", resumed.stderr.read())
    assert resumed.wait() == 130


def test_processes_that_another_launcher_started_must_be_as_many(run, chain, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ran = run("finetune", chain.model, "--out", tmp_path / "tuned", "--processes", 3)
    assert "--processes is 3, but this command was started as one of 2 processes. Leave --processes out." in ran.complaint
