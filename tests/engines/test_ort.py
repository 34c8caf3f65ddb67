import pytest
import torch

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import load_denoiser, open_session
from engines import build_engine
from tests.conftest import check_no_further, tiny_inputs, tiny_model
from tests.engines.reference_check import check_against_reference


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_its_provider_is_refused(engine):
    with pytest.raises(UnsupportedError, match=r"no CUDA provider\. Install onnxruntime-gpu"):
        open_session(engine, device="cuda")
