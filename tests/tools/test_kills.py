"""Commands that are killed at random moments leave nothing behind once they have run again, and end in the same result."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from calibration.run.checkpoint import holds_checkpoint
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.runtime.manifest import Manifest

pytestmark = pytest.mark.extended

ROOT = Path(__file__).parents[2]
KILLS = 4  # of each command
SMALL = ("--rows", "2", "--set", "calibration_samples=2", "--set", "batch=2", "--set", "steps=6", "--set", "rank=2")


def start(directory, *arguments):
    command = [sys.executable, "-m", "edm_deploy_tools.cli", *map(str, arguments)]
    environment = os.environ | {"TMPDIR": str(directory / "tmp"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=directory, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def run(directory, *arguments):
    process = start(directory, *arguments)
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()


def kill_after(seconds, directory, *arguments):
    process = start(directory, *arguments)
    time.sleep(seconds)
    process.send_signal(signal.SIGKILL)
    process.communicate()


COMMANDS = {
    "finetune": ("finetune", "model", "--out", "artifact", "--overwrite", *SMALL),
    "export": ("export", "artifact", "--out", "onnx", "--overwrite"),
    "build-engine": ("build-engine", "onnx", "--out", "engine", "--overwrite", "--backend", "ort"),
}
OUT = {"finetune": "artifact", "export": "onnx", "build-engine": "engine"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model_dir):
    """Each command's result without a kill, and the seconds that it took."""
    directory = tmp_path_factory.mktemp("kills")
    (directory / "tmp").mkdir()
    shutil.copytree(tiny_model_dir, directory / "model")
    seconds = {}
    for name, arguments in COMMANDS.items():
        started = time.monotonic()
        run(directory, *arguments)
        seconds[name] = time.monotonic() - started
    return directory, seconds


def digest(directory, command):
    if command == "finetune":
        return Artifact.load(directory / "artifact").digest
    manifest = Manifest.read(directory / OUT[command], kind="onnx" if command == "export" else "engine")
    return manifest.artifact, manifest.sites, manifest.plan, sorted(manifest.files)  # a graph's bytes differ from run to run


@pytest.mark.parametrize("kill", range(KILLS))
@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_runs_again_to_the_same_result_and_leaves_nothing(whole, command, kill):
    directory, seconds = whole
    before, names = digest(directory, command), sorted(path.name for path in directory.iterdir())
    # Its last half: starting Python and torch takes the first one and writes nothing.
    kill_after(seconds[command] * random.Random(f"{command} {kill}").uniform(0.4, 1.0), directory, *COMMANDS[command])
    resume = ["--resume"] if holds_checkpoint(directory / "artifact.checkpoint") else []
    run(directory, *COMMANDS[command], *resume)
    assert digest(directory, command) == before
    assert sorted(path.name for path in directory.iterdir()) == names
    # ONNX Runtime writes .ses when it is imported.
    assert [path.name for path in (directory / "tmp").iterdir() if path.name != ".ses"] == []
