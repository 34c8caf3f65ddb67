"""The session that CUDA graphs need, on the CPU provider: fixed sizes, buffers at fixed addresses."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import open_session
from edm_deploy.runtime.manifest import ShapeRange
from engines import build_engine
from engines.nvidia.ort_fixed_buffers import FixedBuffers
from engines.nvidia.ort_providers import ProviderSettings
from engines.ort import OrtSession
from tests.conftest import tiny_inputs

ort = pytest.importorskip("onnxruntime")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(onnx_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("fixed") / "engine"
    manifest = build_engine(onnx_w4a4, path, backend="ort", options=BuildOptions(threads=1, profile={"batch": ShapeRange(2, 2, 2)}))
    return path, manifest


@pytest.fixture(scope="module")
def fixed(engine):
    path, manifest = engine
    with OrtSession(ort, path / GRAPH_NAME, manifest, CPU, ProviderSettings(provider="cpu", cuda_graphs=True)) as session:
        yield session


def test_buffers_at_fixed_addresses_give_the_results_of_any_others(fixed, engine):
    with open_session(engine[0])[1] as plain:
        for seed in (0, 1):
            inputs = tiny_inputs("unet2d", 2, seed=seed)
            strided = inputs | {"sample": inputs["sample"].contiguous(memory_format=torch.channels_last)}
            assert torch.equal(fixed.run(strided)["prediction"], plain.run(inputs)["prediction"])


def test_results_of_fixed_buffers_outlive_the_next_run_and_are_those_of_their_thread(fixed):
    inputs = [tiny_inputs("unet2d", 2, seed=seed) for seed in range(4)]
    alone = [fixed.run(each)["prediction"] for each in inputs]
    kept = [each.clone() for each in alone]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda each: fixed.run(each)["prediction"], inputs * 3))
    assert all(torch.equal(found, kept[index % 4]) for index, found in enumerate(together))
    assert all(torch.equal(found, before) for found, before in zip(alone, kept, strict=True))


def test_the_graph_of_a_fixed_session_has_no_dynamic_dimension(fixed):
    described = [*fixed._session.get_inputs(), *fixed._session.get_outputs()]
    assert [size for entry in described for size in entry.shape if not isinstance(size, int)] == []


def test_a_session_with_a_dynamic_dimension_is_refused(engine):
    path, manifest = engine
    session = ort.InferenceSession(path / GRAPH_NAME, providers=["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match=r"does not state that of output 'prediction' .*Build without --cuda-graphs"):
        FixedBuffers(session, manifest, CPU)
