"""The distribution: sdist, wheel, the commands of an installed wheel, and what a deployment machine needs of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import HeaderParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from packaging.requirements import Requirement

from tests.conftest import TINY_UNET

ONE_LEVEL = TINY_UNET | {"block_out_channels": [8], "down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}

ROOT = Path(__file__).parent.parent
SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
PACKAGES = {"edm_deploy": "edm_deploy", "calibration": "calibration", "engines": "engines", "tools": "edm_deploy_tools"}  # by folder
SOURCES = {
    f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
    for folder, package in PACKAGES.items()
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
}
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
BACKEND = {"ort": "onnxruntime"}  # the one backend of the deployment machine, and its package
BUILD_SDIST = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
COMMANDS = """
import json, sys
from importlib.metadata import entry_points

(command,) = entry_points(group="console_scripts", name="edm-deploy")
main = command.load()
for arguments in json.loads(sys.argv[1]):
    if code := main(arguments):
        raise SystemExit(code)
print("|", sys.modules["edm_deploy_tools"].__file__, sys.modules["calibration"].__file__, sep="|")
"""
OPEN_ENGINE = """
import importlib, sys
import edm_deploy

for name in sys.argv[2:]:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{name} can be imported")
pipe = edm_deploy.load_pipeline(sys.argv[1], scheduler="dpm-solver++")
pipe.set_progress_bar_config(disable=True)
images = pipe(batch_size=3, num_inference_steps=2).images
print(edm_deploy.__version__, edm_deploy.__file__, *(image.size for image in images), sep="|")
"""


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that ends well, in an environment without the repository."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    finished = subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, f"{command} ended with {finished.returncode}:\n{finished.stdout}\n{finished.stderr}"
    return finished.stdout


@dataclass(frozen=True)
class Built:
    """A copy of the repository, its sdist, and the wheels that are built from the sdist and from the copy."""

    repository: Path
    sdist: Path
    wheel: Path
    wheel_of_repository: Path

    @property
    def metadata(self) -> Message:
        """METADATA of the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            return HeaderParser().parsestr(archive.read(name).decode())


def files_of(wheel: Path) -> set[str]:
    """Files of a wheel, those of its dist-info apart."""
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not re.match(r"edm_deploy-[^/]*\.dist-info/", name)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built in a copy of the repository: a build leaves folders behind."""
    root = tmp_path_factory.mktemp("build")
    for folder in PACKAGES:
        shutil.copytree(ROOT / folder, root / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root / "copy" / name)
    (root / "copy" / "edm_deploy_tools").symlink_to("tools")  # as in a checkout that is used without an installation

    def wheel(source: Path, out: Path) -> Path:
        run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", out, source, cwd=root)
        (path,) = out.iterdir()
        return path

    name = run(sys.executable, "-c", BUILD_SDIST, root, cwd=root / "copy").splitlines()[-1]
    with tarfile.open(root / name) as archive:
        archive.extractall(root / "unpacked")  # ours: `filter` came in the middle of Python 3.11
    (unpacked,) = (root / "unpacked").iterdir()
    return Built(root / "copy", root / name, wheel(unpacked, root / "from-sdist"), wheel(root / "copy", root / "from-copy"))


def environment_with(wheel: Path, path: Path) -> Path:
    """An environment with the wheel alone; returns its site-packages."""
    venv.create(path, with_pip=False, symlinks=True)
    python = path / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", "--no-compile", wheel, cwd=path)
    (site_packages,) = path.glob("lib/python3*/site-packages")
    return site_packages


@pytest.fixture(scope="module")
def installed(built: Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Environment in which the wheel is installed; its dependencies are those of the environment that runs the tests.

    A folder named in a .pth file comes after the environment's own packages, and .pth files inside that folder are not read: the editable
    installation of the repository, which is such a file, has no effect.
    """
    path = tmp_path_factory.mktemp("installed")
    (environment_with(built.wheel, path) / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    return path


@pytest.mark.extended  # `make test` itself runs from one
def test_an_editable_installation_finds_every_package(built, tmp_path):
    venv.create(tmp_path, with_pip=False, symlinks=True)
    python = tmp_path / "bin" / "python"
    copy = built.repository
    (next(tmp_path.glob("lib/python3*/site-packages")) / "dependencies.pth").write_text(f"{SITE_PACKAGES}\n")
    install = ("-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation", "--no-index", "--editable", copy)
    run(sys.executable, *install, cwd=tmp_path)
    # A sub-package is searched in the folder of its package, which is found without importing it.
    code = "import sys; from importlib.util import find_spec; print(*[find_spec(name).submodule_search_locations[0] for name in sys.argv[1:]], sep='|')"
    folders = run(python, "-c", code, *PACKAGES.values(), cwd=tmp_path).strip().split("|")
    assert [Path(folder) for folder in folders] == [copy / folder for folder in PACKAGES]


@dataclass(frozen=True)
class Chain:
    """What the commands of the installed wheel wrote."""

    artifact: Path
    engine: Path
    images: Path
    report: Path
    packages: tuple[Path, ...]  # files that the commands' packages were imported from


@pytest.fixture(scope="module")
def chain(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """calibrate, export, build-engine, evaluate and sample, in a folder with nothing but a model.

    The first four run in one process, which imports torch once, through the entry point that the script `edm-deploy` calls; sample is that script.
    """
    root = tmp_path_factory.mktemp("empty")
    torch.manual_seed(0)
    DDIMPipeline(unet=UNet2DModel(**ONE_LEVEL), scheduler=DDIMScheduler()).save_pretrained(root / "model")
    (backend,) = BACKEND
    commands = (
        "calibrate model --out artifact --rows 2 --set calibration_samples=2 --set bias_correction=false",
        "export artifact --out onnx",
        f"build-engine onnx --out engine --backend {backend} --batch 1:4:8",
        "evaluate artifact engine --out report --samples 2 --steps 2",
    )
    said = run(installed / "bin" / "python", "-c", COMMANDS, json.dumps([line.split() for line in commands]), cwd=root)
    run(installed / "bin" / "edm-deploy", *["sample", "engine", "--out", "images", "--num-images", "3", "--steps", "2"], cwd=root)
    packages = tuple(Path(name.strip()) for name in said.rpartition("||")[2].split("|"))
    return Chain(root / "artifact", root / "engine", root / "images", root / "report", packages)


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(built):
    assert files_of(built.wheel_of_repository) == SOURCES


def test_a_wheel_built_from_the_sdist_holds_the_same_files(built):
    assert files_of(built.wheel) == files_of(built.wheel_of_repository)


def test_wheel_and_sdist_carry_version_readme_and_licence(built):
    assert built.metadata["Version"] == VERSION
    assert built.metadata["License-Expression"] == "Apache-2.0"
    assert built.metadata.get_payload().startswith("# edm-deploy")
    with tarfile.open(built.sdist) as archive:
        assert {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= {name.partition("/")[2] for name in archive.getnames()}


def test_all_packages_are_marked_as_typed(built):
    assert {f"{package}/py.typed" for package in PACKAGES.values()} <= files_of(built.wheel)


def test_the_installed_commands_make_an_artifact_an_engine_images_and_a_report(chain, installed):
    provenance = json.loads((chain.artifact / "artifact.json").read_text())["provenance"]
    assert provenance["versions"]["edm-deploy"] == VERSION
    assert sorted(path.name for path in chain.images.iterdir()) == ["000.png", "001.png", "002.png", "grid.png"]
    report = json.loads((chain.report / "report.json").read_text())
    # W8A8: rounding costs about 1e-4 of the squared prediction; a wrong scale or a missing bias costs far more than 1e-2.
    assert [0 < result["noise_error"] < 1e-2 for result in report["results"]] == [True, True]
    assert (chain.report / "report.html").is_file()
    assert len(chain.packages) == 2
    assert all(path.is_relative_to(installed) for path in chain.packages)


def requirements_of(name: str, extra: str = "") -> list[str]:
    """Names of the installed distributions that `name` requires, its extras apart but for one."""
    found = [Requirement(line) for line in distribution(name).requires or []]
    return [requirement.name for requirement in found if requirement.marker is None or requirement.marker.evaluate({"extra": extra})]


def closure(names: list[str]) -> set[str]:
    """Canonical names of distributions with all that they require in turn."""
    done: set[str] = set()
    while names:
        name = re.sub(r"[-_.]+", "-", names.pop()).lower()
        if name not in done:
            done.add(name)
            names += requirements_of(name)
    return done


@pytest.fixture(scope="module")
def deployment(built: Built, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Environment with the wheel, what its metadata requires and one backend, nothing else; and the names of its direct requirements.

    The distributions are links into the environment that runs the tests. `calibration` and `edm_deploy_tools`, which the wheel also installs, are
    removed.
    """
    path = tmp_path_factory.mktemp("deployment")
    site_packages = environment_with(built.wheel, path)
    for package in ("calibration", "edm_deploy_tools"):
        shutil.rmtree(site_packages / package)
    required = [Requirement(line) for line in built.metadata.get_all("Requires-Dist")]
    core = sorted(requirement.name for requirement in required if requirement.marker is None)
    for name in closure([*core, *BACKEND.values()]):
        # The first part of each path: a package's folder, a module, the metadata. `..` and __pycache__ belong to no package.
        for first in {file.parts[0] for file in distribution(name).files or ()} - {"..", "__pycache__"}:
            if not (site_packages / first).exists():
                (site_packages / first).symlink_to(SITE_PACKAGES / first)
    return path, core


def test_an_engine_is_sampled_with_the_core_requirements_and_one_backend(chain, deployment, tmp_path):
    path, core = deployment
    assert set(core) <= {"torch", "numpy", "safetensors", "diffusers", "pillow", "msgspec"}
    shutil.copytree(chain.engine, tmp_path / "engine")
    refused = ("calibration", "edm_deploy_tools", "onnx", "onnx_ir", "onnxscript", "openvino", "transformers", "psutil", "typer", "rich")
    said = run(path / "bin" / "python", "-c", OPEN_ENGINE, "engine", *refused, cwd=tmp_path).split("|")
    assert said[0] == VERSION
    assert Path(said[1]).is_relative_to(path)
    assert [size.strip() for size in said[2:]] == ["(8, 8)"] * 3
