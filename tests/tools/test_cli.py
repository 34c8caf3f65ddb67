from __future__ import annotations

import json
import subprocess
import sys

import pytest
from PIL import Image

COMMANDS = ("calibrate", "finetune", "export", "build-engine", "sample", "evaluate", "compare", "bench", "inspect", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"Example: edm-deploy {command}" in " ".join(ran.out.split())


def test_help_loads_neither_torch_nor_diffusers():
    script = "import sys; from edm_deploy_tools.cli import main; main(['--help']); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_the_chain_leaves_directories_and_no_temporaries(chain):
    found = {path.name for path in chain.model.parent.iterdir()}
    assert {"model", "artifact", "onnx", "engine"} <= found
    assert not [name for name in found if name.startswith(".")]


def test_commands_say_what_they_wrote(run, chain, tmp_path):
    ran = run("export", chain.artifact, "--out", tmp_path / "onnx")
    assert ran.code == 0
    assert f"Wrote {tmp_path / 'onnx'}" in ran.out


def test_build_prints_the_plan(run, chain, tmp_path):
    ran = run("build-engine", chain.onnx, "--out", tmp_path / "engine", "--backend", "ort")
    assert ran.code == 0
    assert "Plan: " in ran.out
    assert "stored W8A8" in ran.out


def test_finetune_writes_an_artifact_of_four_bits(run, chain, tmp_path):
    small = ("--rows", 2, "--set", "steps=2", "--set", "batch=2", "--set", "calibration_samples=2", "--set", "rank=2")
    ran = run("finetune", chain.model, "--out", tmp_path / "tuned", "--for", "openvino", *small)
    assert ran.code == 0, ran.err
    assert "W4A4" in ran.out
    assert (tmp_path / "tuned" / "artifact.json").is_file()


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++", "euler", "unipc", "ddpm"])
def test_sample_draws_with_any_scheduler(run, chain, tmp_path, scheduler):
    ran = run("sample", chain.engine, "--out", tmp_path / "images", "--num-images", 3, "--steps", 3, "--scheduler", scheduler)
    assert ran.code == 0, ran.err
    assert "s per image" in ran.out
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000.png", "001.png", "002.png", "grid.png"]
    assert Image.open(tmp_path / "images" / "000.png").size == (8, 8)


def test_json_is_all_of_stdout(run, chain, tmp_path):
    for command in (
        ("sample", chain.engine, "--out", tmp_path / "images", "--num-images", 2, "--steps", 2, "--json"),
        ("inspect", chain.artifact, "--json"),
        ("bench", chain.engine, "--batch", 2, "--rounds", 2, "--json"),
        ("evaluate", chain.artifact, "--out", tmp_path / "report", "--samples", 2, "--steps", 2, "--json"),
    ):
        ran = run(*command)
        assert ran.code == 0, ran.err
        assert isinstance(json.loads(ran.out), dict)


def test_same_seed_same_images(run, chain, tmp_path):
    for name in ("a", "b"):
        assert run("sample", chain.engine, "--out", tmp_path / name, "--num-images", 2, "--steps", 2, "--seed", 7).code == 0
    assert (tmp_path / "a" / "grid.png").read_bytes() == (tmp_path / "b" / "grid.png").read_bytes()
