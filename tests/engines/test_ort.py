import dataclasses
import sys
import types
from pathlib import Path

import pytest
import torch

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import UnsupportedError
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import load_denoiser, open_session
from edm_deploy.runtime.manifest import Manifest
from engines import build_engine
from engines.nvidia.ort_providers import ProviderSettings
from engines.ort import BACKEND, OrtSession, check_provider
from tests.conftest import check_no_further, tiny_inputs, tiny_model
from tests.engines.reference_check import check_against_reference

ort = pytest.importorskip("onnxruntime")
ON_CUDA = ProviderSettings(provider="cuda")


@pytest.fixture(scope="module")
def engine(onnx_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("ort") / "engine"
    build_engine(onnx_w4a4, path, backend="ort", options=BuildOptions(threads=1))
    return path


def test_it_agrees_with_the_reference_at_mixed_timesteps(engine, artifact_w4a4):
    check_against_reference(engine, artifact_w4a4)


def test_packed_weights_agree_with_the_reference(onnx_w4a4_packed, artifact_w4a4, tmp_path):
    build_engine(onnx_w4a4_packed, tmp_path / "engine", backend="ort")
    check_against_reference(tmp_path / "engine", artifact_w4a4)


def test_a_float16_graph_agrees_with_the_reference_as_far_as_float16_goes(onnx_w4a4_fp16, artifact_w4a4, tmp_path):
    build_engine(onnx_w4a4_fp16, tmp_path / "engine", backend="ort")
    check_against_reference(tmp_path / "engine", artifact_w4a4, slack=2)


def test_one_engine_serves_every_batch_size_of_its_profile(engine, artifact_w4a4):
    denoiser, reference = load_denoiser(engine), Reference(artifact_w4a4)
    family, _, model = tiny_model("unet2d")
    for batch in (1, 5, 2):
        inputs = tiny_inputs("unet2d", batch)
        check_no_further(denoiser(**inputs).sample, reference(inputs), family.forward(model, inputs))


def test_convolutions_are_planned_in_floating_point(engine):
    manifest, _ = open_session(engine)
    executed = {manifest.sites[name].op: set() for name in manifest.plan}
    for name, plan in manifest.plan.items():
        executed[manifest.sites[name].op].add(plan.executed)
    assert executed["conv2d"] == {"float"}
    assert "int8" in executed["linear"]


def test_inputs_need_not_be_contiguous(engine):
    _, session = open_session(engine)
    inputs = tiny_inputs("unet2d", 2)
    strided = inputs | {"sample": inputs["sample"].contiguous(memory_format=torch.channels_last)}
    assert torch.equal(session.run(strided)["prediction"], session.run(inputs)["prediction"])


def test_outputs_outlive_the_next_run(engine):
    _, session = open_session(engine)
    first = session.run(tiny_inputs("unet2d", 2, seed=0))["prediction"]
    kept = first.clone()
    session.run(tiny_inputs("unet2d", 2, seed=1))
    assert torch.equal(first, kept)


needs_no_gpu = pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="this onnxruntime is onnxruntime-gpu")


@needs_no_gpu
def test_cuda_without_its_provider_is_refused(engine):
    with pytest.raises(UnsupportedError, match=r"has no CUDAExecutionProvider: it has .*CPUExecutionProvider .*edm-deploy\[ort-gpu\]"):
        open_session(engine, device="cuda")


@needs_no_gpu
@pytest.mark.parametrize(("provider", "name"), [("cuda", "CUDAExecutionProvider"), ("tensorrt", "TensorrtExecutionProvider")])
def test_a_build_for_a_provider_that_is_not_installed_is_refused(onnx_w4a4, provider, name, tmp_path):
    with pytest.raises(UnsupportedError, match=rf"has no {name}: it has .*pip uninstall onnxruntime onnxruntime-gpu, then pip install"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="ort", options=BuildOptions(provider=provider))
    assert list(tmp_path.iterdir()) == []


def test_an_engine_for_the_cpu_states_it_and_opens_on_no_other_device(onnx_w4a4, engine, tmp_path):
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="ort", options=BuildOptions(provider="cpu", threads=1))
    assert manifest.build["options"] == {"threads": 1, "provider": "cpu", "cuda_graphs": False}
    inputs = tiny_inputs("unet2d", 2)
    with open_session(tmp_path / "engine")[1] as session, open_session(engine)[1] as plain:
        assert torch.equal(session.run(inputs)["prediction"], plain.run(inputs)["prediction"])
    with pytest.raises(UnsupportedError, match=r"built for ONNX Runtime's provider cpu, and device is cuda\. Open it with device='cpu'"):
        open_session(tmp_path / "engine", device="cuda")


def test_an_engine_for_a_gpu_opens_there_by_default(engine):
    manifest = Manifest.read(engine, kind="engine")
    assert BACKEND.default_device(manifest) == "cpu"
    on_gpu = dataclasses.replace(manifest, build={**manifest.build, "options": {"threads": None, "provider": "tensorrt"}})
    assert BACKEND.default_device(on_gpu) == "cuda"


def test_an_engine_without_a_provider_records_none(engine):
    assert Manifest.read(engine, kind="engine").build["options"] == {"threads": 1}


def test_two_packages_of_one_module_are_named_where_a_provider_is_missing(monkeypatch, tmp_path):
    other = tmp_path / "onnxruntime_gpu-9.9.dist-info"
    other.mkdir()
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: onnxruntime-gpu\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnsupportedError, match=r"\(both onnxruntime [\d.]+ and onnxruntime-gpu 9\.9 installed\)"):
        check_provider(types.SimpleNamespace(__version__="9.9", get_available_providers=lambda: ["CPUExecutionProvider"]), ON_CUDA)


def test_a_module_that_a_removed_package_left_incomplete_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(UnsupportedError, match=r"incomplete .*install the same files, and one was removed\. Run pip uninstall"):
        BACKEND.build(Path("none"), Manifest, BuildOptions(), Path("none"))


@needs_no_gpu
def test_a_provider_that_does_not_start_is_no_silent_fallback(engine):
    """ONNX Runtime itself warns and runs on the CPU."""
    manifest = Manifest.read(engine, kind="engine")
    with pytest.raises(UnsupportedError, match=r"could not start CUDAExecutionProvider: a GPU or a library"):
        OrtSession(ort, engine / GRAPH_NAME, manifest, torch.device("cpu"), ON_CUDA)
