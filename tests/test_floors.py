"""The house stands: who may import whom, and each vendor package has one home."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
MAY_IMPORT = {  # folder -> our folders it may name
    "edm_deploy": {"edm_deploy"},
    "calibration": {"calibration", "edm_deploy"},
    "engines": {"engines", "edm_deploy"},
    "tools": {"edm_deploy_tools", "calibration", "engines", "edm_deploy"},
}
OURS = {"edm_deploy", "calibration", "engines", "tools", "edm_deploy_tools"}
ONLY_HERE = {  # third-party package -> the only places that may name it
    "tensorrt": ("engines/trt.py", "engines/kernels/plugin.py"),
    "cuda": ("engines/kernels/",),
    "tensorrt_rtx": ("engines/trt_rtx.py",),
    "onnxruntime": ("engines/ort.py",),
    "openvino": ("engines/openvino.py",),
    "onnx": ("edm_deploy/export/",),
    "onnx_ir": ("edm_deploy/export/",),
    "onnxscript": ("edm_deploy/export/",),
    "diffusers": ("edm_deploy/models/", "edm_deploy/pipelines.py", "edm_deploy/own_pipelines.py", "edm_deploy/assembly.py", "tools/"),
    "typer": ("tools/",),
    "rich": ("tools/",),
    "PIL": ("tools/", "edm_deploy/pipelines.py"),
    "pyarrow": ("tools/pictures.py",),
}
FILES = sorted(path for folder in MAY_IMPORT for path in (ROOT / folder).rglob("*.py"))


def imports(path: pathlib.Path) -> set[str]:
    """Top-level package names imported anywhere in a file, inside functions and by importlib too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downhill(path):
    here = path.relative_to(ROOT)
    for name in imports(path):
        assert name not in OURS or name in MAY_IMPORT[here.parts[0]], f"{here} must not import {name}"
        homes = ONLY_HERE.get(name)
        assert homes is None or str(here).startswith(homes), f"only {homes} may import {name}, not {here}"


def test_the_top_level_is_the_one_that_was_agreed():
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages == {"edm_deploy", "calibration", "engines", "tools", "tests"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_outgrows_one_idea(path):
    lines = len(path.read_text().splitlines())
    assert lines <= 300, f"{path.relative_to(ROOT)} has {lines} lines; which two ideas does it hold?"


def test_every_source_file_has_its_test():
    """tests/ mirrors the tree; underscored files are tested through the ones that use them."""
    missing = []
    for path in FILES:
        here = path.relative_to(ROOT)
        if path.name.startswith("_") or "presets" in here.parts:
            continue
        mirrored = ROOT / "tests" / here.parent / f"test_{path.name}"
        if not mirrored.is_file():
            missing.append(str(here))
    assert missing == []


def test_importing_the_package_stays_light():
    """A deployment machine needs no onnx, no diffusers pipelines and no calibration to open an engine."""
    import subprocess
    import sys

    code = "import sys, edm_deploy; print(*[m for m in ('onnx', 'onnx_ir', 'diffusers', 'calibration', 'engines', 'typer') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []
