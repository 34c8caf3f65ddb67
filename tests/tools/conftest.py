"""A model of a few thousand parameters, quantized, exported and built once for all tests of `tools`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from edm_deploy_tools.cli import main
from edm_deploy_tools.common.child_process import Measured
from tests.conftest import TINY_UNET


@dataclass(frozen=True)
class Chain:
    """Directories of a model, its artifact, its ONNX graph and its engine."""

    model: Path
    artifact: Path
    onnx: Path
    engine: Path


@dataclass(frozen=True)
class Ran:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The line on stderr of a command that was refused."""
        return self.error(2)

    def error(self, code: int) -> str:
        """The line on stderr of a command that ended with an error and this exit code."""
        assert self.code == code
        assert "Traceback" not in self.err
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("Error: ")
        return self.err


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny") / "model"
    DDIMPipeline(unet=UNet2DModel(**TINY_UNET), scheduler=DDIMScheduler()).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def chain(tiny_model_dir):
    root = tiny_model_dir.parent
    made = Chain(model=tiny_model_dir, artifact=root / "artifact", onnx=root / "onnx", engine=root / "engine")
    fast = ["--rows", "4", "--set", "calibration_samples=2"]
    assert main(["calibrate", str(made.model), "--out", str(made.artifact), "--recipe", "minmax", *fast]) == 0
    assert main(["export", str(made.artifact), "--out", str(made.onnx)]) == 0
    assert main(["build-engine", str(made.onnx), "--out", str(made.engine), "--backend", "ort", "--batch", "1:4:8"]) == 0
    return made


@pytest.fixture(scope="session")
def prompted(tmp_path_factory):
    """A tiny Stable Diffusion, calibrated on two prompts; its engine's folder holds text encoder, tokenizer and VAE."""
    from tests.tiny_pipelines import saved

    root = tmp_path_factory.mktemp("prompted")
    made = Chain(model=saved(root / "model"), artifact=root / "artifact", onnx=root / "onnx", engine=root / "engine")
    (root / "prompts.txt").write_text("a cat\n\na dog\n")
    fast = ["--rows", "3", "--set", "calibration_samples=2", "--prompts", str(root / "prompts.txt")]
    assert main(["calibrate", str(made.model), "--out", str(made.artifact), "--recipe", "minmax", *fast]) == 0
    assert main(["export", str(made.artifact), "--out", str(made.onnx)]) == 0
    sizes = ["--batch", "1:4:6", "--height", "8:8:16", "--width", "8:8:16"]
    assert main(["build-engine", str(made.onnx), "--out", str(made.engine), "--backend", "ort", "--with-pipeline", *sizes]) == 0
    return made


@pytest.fixture
def run(capfd) -> Callable[..., Ran]:
    """Runs the command line in this process."""

    def run_command(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run_command


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a directory, to be damaged."""

    def copy(directory: Path) -> Path:
        return Path(shutil.copytree(directory, tmp_path / directory.name))

    return copy


@pytest.fixture
def in_process(monkeypatch):
    """Runs the experiments of a comparison in this process, which needs no new import of torch, and lists their recipes in order."""
    ran = []

    def run(command, *, cwd):
        ran.append(command[command.index("--recipe") + 1])
        code = main(command[3:])
        return Measured(returncode=code, seconds=1.5, peak_bytes=10**6, last_line="Error: failed." if code else "")

    monkeypatch.setattr("edm_deploy_tools.comparison.compare.run_measured", run)
    return ran
