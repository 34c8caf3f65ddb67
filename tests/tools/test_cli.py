from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

COMMANDS = ("calibrate", "finetune", "export", "build-engine", "sample", "evaluate", "compare", "bench", "inspect", "demo")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(run, command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert f"Example: edm-deploy {command}" in " ".join(ran.out.split())


def test_help_loads_neither_torch_nor_diffusers():
    script = "import sys; from edm_deploy_tools.cli import main; main(['--help']); sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_a_command_line_is_completed():
    """As the shell calls it after `edm-deploy cal<TAB>`."""
    environment = os.environ | {"_EDM_DEPLOY_COMPLETE": "complete_bash", "COMP_WORDS": "edm-deploy cal", "COMP_CWORD": "1"}
    ran = subprocess.run([sys.executable, "-m", "edm_deploy_tools"], env=environment, capture_output=True, text=True, check=False)
    assert ran.stdout.split() == ["calibrate"]


def test_completion_can_be_installed(run):
    assert "--install-completion" in run("-h").out


def test_no_temporary_directories_are_left(chain):
    found = {path.name for path in chain.model.parent.iterdir()}
    assert {"model", "artifact", "onnx", "engine"} <= found
    assert not [name for name in found if name.startswith(".")]


def test_json_is_the_only_output_on_stdout(run, chain, tmp_path):
    for command in (
        ("sample", chain.engine, "--out", tmp_path / "images", "--num-images", 2, "--steps", 2, "--json"),
        ("inspect", chain.artifact, "--json"),
        ("bench", chain.engine, "--batch", 2, "--rounds", 2, "--json"),
        ("evaluate", chain.artifact, "--out", tmp_path / "report", "--samples", 2, "--steps", 2, "--json"),
    ):
        ran = run(*command)
        assert ran.code == 0, ran.err
        assert isinstance(json.loads(ran.out), dict)
