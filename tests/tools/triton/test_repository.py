import re
import shutil
from dataclasses import replace

import numpy as np
import onnxruntime
import openvino
import pytest
import torch

from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.triton.repository import outside_the_graph, write_repository
from engines.openvino import save_graph

MIXED = torch.tensor([3.0, 700.0, 40.0])  # the timesteps of three requests in one batch


@pytest.fixture(scope="module")
def noise() -> torch.Tensor:
    """Samples of three requests."""
    return torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def as_engine_of(chain, folder, options=None, **changes):
    """A copy of the engine whose manifest has these changes, and these build options."""
    shutil.copytree(chain.engine, folder)
    manifest = Manifest.read(folder, kind="engine")
    build = manifest.build | {"options": {"precision": "fp32", "threads": None} | (options or {})}
    replace(manifest, **{"build": build} | changes).write(folder, list(manifest.files))
    return folder


def test_the_denoiser_of_an_onnx_directory_is_the_engine_at_mixed_timesteps(chain, tmp_path, noise):
    written = write_repository(chain.onnx, tmp_path / "models", name="unet", backend=None)
    assert (written.denoiser, written.pipeline, written.reason) == ("unet", "unet_pipeline", "")
    session = onnxruntime.InferenceSession(tmp_path / "models/unet/1/model.onnx")
    (found,) = session.run(["prediction"], {"sample": noise.numpy(), "timestep": MIXED.numpy()})
    with load_denoiser(tmp_path / "models/unet_pipeline/1/engine") as denoiser:
        expected = denoiser(noise, MIXED).sample
    assert np.array_equal(found, expected.numpy())
    names = sorted(path.name for path in (tmp_path / "models").iterdir())
    assert names == ["edm-deploy.json", "unet", "unet_pipeline"]
    # A repository is replaced by another one, whatever the names of its models, and by nothing else.
    write_repository(chain.engine, tmp_path / "models", name="other", backend=None)
    assert (tmp_path / "models/other_pipeline/1/model.py").is_file()
    assert not (tmp_path / "models/unet").exists()


@pytest.mark.extended
def test_openvino_reads_a_graph_with_its_tables_inside(chain, tmp_path, noise):
    save_graph(chain.onnx / "model.onnx", tmp_path / "model.xml")
    model = openvino.Core().compile_model(tmp_path / "model.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert {each.any_name for each in model.inputs} == {"sample", "timestep"}
    found = model({"sample": noise.numpy(), "timestep": MIXED.numpy()})["prediction"]
    with load_denoiser(chain.engine) as denoiser:
        expected = denoiser(noise, MIXED).sample.numpy()
    assert (
        np.square(found - expected).mean() < 1e-3 * np.square(expected).mean()
    )  # W8A8: a wrong row of the tables is an error of 0.01 or more


@pytest.mark.parametrize(("provider", "half"), [("cuda", None), ("tensorrt", "fp16"), ("tensorrt", None)])
def test_an_ort_engine_for_a_gpu_is_served_on_one(provider, half, chain, tmp_path):
    engine = as_engine_of(chain, tmp_path / "engine", options={"provider": provider, "precision": half})
    write_repository(engine, tmp_path / "models", name="unet", backend=None)
    denoiser, pipeline = ((tmp_path / "models" / name / "config.pbtxt").read_text() for name in ("unet", "unet_pipeline"))
    assert denoiser.count("kind: KIND_GPU") == pipeline.count("kind: KIND_GPU") == 1
    assert ('name: "tensorrt"' in denoiser) == (provider == "tensorrt")
    assert [line.strip() for line in denoiser.splitlines() if "FP16" in line or 'value: "FP32"' in line] == (
        [f'value: "{"FP16" if half else "FP32"}"'] if provider == "tensorrt" else []
    )


def test_an_artifact_is_built_for_a_backend_of_artifacts(chain, tmp_path):
    written = write_repository(chain.artifact, tmp_path / "models", name="unet", backend="cpu")
    assert (written.denoiser, written.reason) == (None, "Triton has no backend for an engine of cpu")
    assert Manifest.read(tmp_path / "models/unet_pipeline/1/engine", kind="engine").backend == "cpu"
    assert "KIND_CPU" in (tmp_path / "models/unet_pipeline/config.pbtxt").read_text()


def test_what_runs_outside_the_graph_is_left_to_the_python_model(chain, tmp_path):
    manifest = Manifest.read(chain.engine, kind="engine")
    rows = torch.zeros(manifest.num_train_timesteps, dtype=torch.int32)
    correction = Correction(row_of_timestep=rows, scale=torch.ones(1, 3), input_bias=torch.zeros(1, 3)).to_json()
    assert "tac" in outside_the_graph(replace(manifest, correction=correction))
    assert "pcr" in outside_the_graph(replace(manifest, relaxed=((0, 10),)))
    assert "LoRAs" in outside_the_graph(replace(manifest, adapters=AdapterInputs(rank=2, layers={"conv_in": (8, 3, 3, 3)})))
    engine = as_engine_of(chain, tmp_path / "corrected", correction=correction)
    written = write_repository(engine, tmp_path / "models", name="unet", backend=None)
    assert written.denoiser is None
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["edm-deploy.json", "unet_pipeline"]


def test_a_tensorrt_engine_is_a_plan_and_other_engines_have_no_backend(chain, tmp_path):
    for backend, reason in (("trt-rtx", "no backend for an engine of trt-rtx"), ("openvino", "name the artifact with --for openvino")):
        engine = as_engine_of(chain, tmp_path / backend, backend=backend)
        assert reason in write_repository(engine, tmp_path / f"{backend}-models", name="d", backend=None).reason
    engine = as_engine_of(chain, tmp_path / "trt", backend="trt")
    (engine / "engine.trt").write_bytes(b"plan")  # TensorRT is not needed to copy it
    assert write_repository(engine, tmp_path / "models", name="d", backend="trt").denoiser == "d"
    assert (tmp_path / "models/d/1/model.plan").read_bytes() == b"plan"
    assert "KIND_GPU" in (tmp_path / "models/d_pipeline/config.pbtxt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{engine}", "--for", "openvino"), "--for openvino: .* is an engine of backend ort"),
        (("{engine}", "--name", "a/b"), "--name 'a/b': expected letters, digits"),
        (("{engine}", "--name", ".."), "--name '..': expected letters"),
        (("{onnx}", "--dtype", "fp16"), "--dtype decides the graph, and --format triton takes a graph as it is"),
        (("{model}",), "has no manifest.json"),
    ],
)
def test_a_repository_that_cannot_be_written_is_one_line_and_code_2(run, chain, tmp_path, arguments, message):
    filled = [argument.format(engine=chain.engine, onnx=chain.onnx, model=chain.model) for argument in arguments]
    ran = run("export", *filled, "--format", "triton", "--out", tmp_path / "models")
    assert re.search(message, ran.complaint), ran.complaint
    assert not (tmp_path / "models").exists()
