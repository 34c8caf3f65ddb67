"""What holds for every backend that the folder has: built here or refused with the mend, and exact at every site where it runs."""

import importlib.util
from dataclasses import replace

import pytest
import torch

import engines
from edm_deploy import registry
from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import CAPABILITIES, plan_layers
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.evaluation.site_agreement import agreement, cut_from_inputs
from tests.conftest import artifact_by_hand, tiny_inputs

NAMES = registry.names(engines)
OPTIONS = {"trt-rtx": BuildOptions(gpu="rtx3090")}
RUNS_HERE = ["ort", "openvino", "cuda", "cpu"]  # cuda: its kernels' arithmetic on the CPU; with a GPU, tests/engines/test_cuda.py


def test_every_backend_has_its_target():
    assert set(NAMES) == set(CAPABILITIES)


def test_naming_a_backend_imports_no_vendor_package():
    import subprocess
    import sys

    code = (
        "import sys, engines; from edm_deploy import registry; "
        "[registry.load(engines, name, 'BACKEND') for name in registry.names(engines)]; "
        "print(*[m for m in ('onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'onnx') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split() == []


def missing_package(name):
    """Whether the backend's vendor package cannot be imported on this machine; `cuda` and `cpu` build with torch alone."""
    packages = {"ort": "onnxruntime", "openvino": "openvino", "trt-rtx": "tensorrt_rtx", "trt": "tensorrt"}
    return name in packages and importlib.util.find_spec(packages[name]) is None


@pytest.fixture(scope="session")
def sources(onnx_w4a4, artifact_w4a4, tmp_path_factory):
    """The directory that each kind of backend builds from."""
    artifact = tmp_path_factory.mktemp("artifact") / "w4a4"
    artifact_w4a4.save(artifact)
    return {"onnx": onnx_w4a4, "artifact": artifact}


@pytest.mark.parametrize("name", NAMES)
def test_a_backend_builds_here_or_says_what_to_install(name, sources, tmp_path):
    source = sources[engines.backend_named(name).builds_from]
    if missing_package(name):
        with pytest.raises(UnsupportedError, match=r"pip install"):
            engines.build_engine(source, tmp_path / "engine", backend=name, options=OPTIONS.get(name))
        assert list(tmp_path.iterdir()) == []
        return
    manifest = engines.build_engine(source, tmp_path / "engine", backend=name, options=OPTIONS.get(name))
    assert set(manifest.plan) == set(manifest.sites)
    assert manifest == Manifest.read(tmp_path / "engine", kind="engine")
    assert (tmp_path / "engine" / "model_index.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_the_wrong_kind_of_source_is_refused_with_the_command_that_makes_the_right_one(name, sources, tmp_path):
    builds_from = engines.backend_named(name).builds_from
    other = {"onnx": "artifact", "artifact": "onnx"}[builds_from]
    with pytest.raises(ArtifactError, match=f"{name} builds from .*edm-deploy {'export' if builds_from == 'onnx' else 'build-engine'} "):
        engines.build_engine(sources[other], tmp_path / "engine", backend=name, options=OPTIONS.get(name))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module", params=[(4, 4), (4, 8), (8, 8)], ids=["W4A4", "W4A8", "W8A8"])
def judged(request, tmp_path_factory):
    """An artifact, inputs at mixed timesteps, and a directory that holds it and its graph."""
    artifact = artifact_by_hand(weight_bits=request.param[0], act_bits=request.param[1])
    path = tmp_path_factory.mktemp("judged")
    return artifact, tiny_inputs("unet2d", batch=4), path


@pytest.mark.parametrize("name", RUNS_HERE)
def test_at_every_site_the_codes_are_those_of_the_reference(name, judged):
    artifact, inputs, path = judged
    backend = engines.backend_named(name)
    engine = engine_of(artifact, backend, path)
    dtype = backend.site_dtype(engine)
    cut = cut_from_inputs(artifact, inputs, path / f"cut-{dtype}", dtype=dtype)
    sites = agreement(cut, engine, device="cpu")
    assert {site.site for site in sites} == set(artifact.sites)
    assert [site.site for site in sites if site.ties or site.differ] == []
    assert sum(site.codes for site in sites) == sum(record.x.numel() for record in cut.records.values())
    rounding = (
        torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 1e-5
    )  # an output is rounded once; float32 sums differ in their order
    assert all(site.output_error <= rounding for site in sites)


def engine_of(artifact, backend, path) -> Manifest:
    """A manifest of an engine of this artifact: what a judge is told about it."""
    options, gpu = ({"gpu": "sm_86", "precision": "fp16"}, backend.builds_from == "artifact")
    plans = plan_layers(artifact, backend.target)
    return replace(
        Manifest.of(artifact, {name: name for name in artifact.sites}, kind="engine", dtype="fp32", weight_storage="int8"),
        backend=backend.name,
        plan=plans,
        build={"options": options if gpu else {}, "layout": 1},
    )
