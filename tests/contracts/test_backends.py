"""What holds for every backend that the folder has: built here or refused with the mend, and exact at every site where it runs."""

import importlib.util
from pathlib import Path

import pytest
import torch

import engines
from edm_deploy import lookup
from edm_deploy.denoiser import open_session
from edm_deploy.errors import UnsupportedError
from edm_deploy.export.cut import onnx_cut_at_sites
from edm_deploy.manifest import Manifest
from edm_deploy.reference import Reference
from edm_deploy.session import BuildOptions
from edm_deploy.target import TARGETS
from tests.conftest import artifact_by_hand, tiny_inputs

NAMES = lookup.names(engines)
OPTIONS = {"trt-rtx": BuildOptions(gpu="rtx3090")}
RUNS_HERE = ["ort", "openvino"]


def test_every_backend_has_its_target():
    assert set(NAMES) == set(TARGETS)


def test_naming_a_backend_imports_no_vendor_package():
    import subprocess
    import sys

    code = (
        "import sys, engines; from edm_deploy import lookup; "
        "[lookup.load(engines, name, 'BACKEND') for name in lookup.names(engines)]; "
        "print(*[m for m in ('onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'onnx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def missing_package(name):
    """Whether the backend's vendor package cannot be imported on this machine."""
    packages = {"ort": "onnxruntime", "openvino": "openvino", "trt-rtx": "tensorrt_rtx", "trt": "tensorrt"}
    return importlib.util.find_spec(packages[name]) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_builds_here_or_says_what_to_install(name, onnx_w4a4, tmp_path):
    if missing_package(name):
        with pytest.raises(UnsupportedError, match=r"pip install"):
            engines.build_engine(onnx_w4a4, tmp_path / "engine", backend=name, options=OPTIONS.get(name))
        assert list(tmp_path.iterdir()) == []
        return
    manifest = engines.build_engine(onnx_w4a4, tmp_path / "engine", backend=name, options=OPTIONS.get(name))
    assert set(manifest.plan) == set(manifest.sites)
    assert manifest == Manifest.read(tmp_path / "engine", kind="engine")
    assert (tmp_path / "engine" / "model_index.json").is_file()


@pytest.fixture(scope="module", params=[(4, 4), (8, 8)], ids=["W4A4", "W8A8"])
def cut(request, tmp_path_factory):
    artifact = artifact_by_hand(weight_bits=request.param[0], act_bits=request.param[1])
    inputs = tiny_inputs("unet2d", batch=4)
    records = Reference(artifact).record(inputs)
    path = tmp_path_factory.mktemp("cut") / "onnx"
    onnx_cut_at_sites(artifact, records, path)
    return path, inputs["timestep"], records


@pytest.mark.parametrize("name", RUNS_HERE)
def test_at_every_site_the_codes_are_those_of_the_reference(name, cut, tmp_path):
    path, timestep, records = cut
    engines.build_engine(path, tmp_path / "engine", backend=name)
    manifest, session = open_session(Path(tmp_path / "engine"))
    inputs = {declared.name: records[declared.name.removesuffix(".x")].x for declared in manifest.inputs[1:]}
    outputs = session.run(inputs | {"timestep": timestep})
    for site, record in records.items():
        assert torch.equal(outputs[f"{site}.codes"].float(), record.codes), site
        assert torch.allclose(outputs[f"{site}.y"], record.y, atol=1e-5 * float(record.y.abs().max())), site
