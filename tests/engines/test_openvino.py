import shutil
import types

import pytest
import torch
from safetensors.torch import save_file

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.export.per_site import onnx_cut_at_sites
from edm_deploy.network.graph_names import GRAPH_NAME, ROW_NAME
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.load import load_denoiser, open_session
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from engines import build_engine
from engines.openvino import ENGINE_NAME, TABLES_NAME, OpenvinoSession, compiled_batches
from tests.conftest import check_no_further, tiny_inputs, tiny_model
from tests.contracts.test_sessions import resident_mib
from tests.engines.reference_check import check_against_reference
from tests.this_cpu import openvino_executes


@pytest.fixture(scope="module")
def engine(onnx_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvino") / "engine"
    build_engine(onnx_w4a4, path, backend="openvino", options=BuildOptions(precision="fp32", threads=2))
    return path


@pytest.fixture(scope="module")
def bf16_engine(onnx_w4a4, tmp_path_factory):
    path = tmp_path_factory.mktemp("openvino") / "engine"
    build_engine(onnx_w4a4, path, backend="openvino", options=BuildOptions(precision="bf16", threads=2))
    return path


def runtime_precisions(session) -> dict[str, str]:
    """Data type that each node of the last compiled graph runs in, by the names of the nodes that it was made from."""
    (model,) = session._models.values()
    found = {}
    for node in model.compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        for name in info["originalLayersNames"].astype(str).split(","):
            found[name] = info["runtimePrecision"].astype(str)
    return found


def test_it_agrees_with_the_reference_at_mixed_timesteps(engine, artifact_w4a4):
    check_against_reference(engine, artifact_w4a4)


def test_in_bfloat16_it_agrees_with_the_reference_as_far_as_bfloat16_goes(bf16_engine, artifact_w4a4):
    # Rounding nothing but each site's input and output to bfloat16 moves the reference of this random network by 0.74 to 1.04 of the same measure.
    check_against_reference(bf16_engine, artifact_w4a4, slack=2)


def test_packed_weights_are_computed_in_integers(onnx_w4a4_packed, artifact_w4a4, tmp_path):
    manifest = build_engine(onnx_w4a4_packed, tmp_path / "engine", backend="openvino")
    assert {plan.executed for plan in manifest.plan.values()} == {openvino_executes()}
    check_against_reference(tmp_path / "engine", artifact_w4a4)


def test_the_plan_is_what_the_compiled_graph_does(engine):
    manifest, _ = open_session(engine)
    assert {(plan.stored, plan.executed) for plan in manifest.plan.values()} == {
        ("W4A4", openvino_executes()),
        ("W8A8", openvino_executes()),
    }


@pytest.mark.extended  # four shapes are compiled; test_sessions.py has two
def test_a_result_does_not_depend_on_the_calls_before_it(engine):
    calls = [tiny_inputs("unet2d", batch) for batch in (1, 5, 2, 3, 4, 6, 8, 7)]
    with load_denoiser(engine) as denoiser:
        first = [denoiser(**inputs).sample for inputs in calls]
        again = [denoiser(**inputs).sample for inputs in reversed(calls)]
    assert [len(found) for found in first] == [1, 5, 2, 3, 4, 6, 8, 7]
    assert all(torch.equal(*pair) for pair in zip(first, reversed(again), strict=True))


@pytest.mark.parametrize(
    ("allowed", "sizes"),
    [
        (ShapeRange(1, 4, 8), (1, 2, 4, 8)),
        (ShapeRange(1, 6, 50), (1, 2, 4, 6, 8, 16, 32, 50)),
        (ShapeRange(3, 3, 9), (3, 4, 8, 9)),
        (ShapeRange(4, 5, 7), (4, 5, 6, 7)),  # few enough to stay compiled
        (ShapeRange(2, 2, 2), (2,)),
    ],
)
def test_the_batch_sizes_that_are_compiled_are_few(allowed, sizes):
    assert compiled_batches(allowed) == sizes


def test_no_batch_size_of_the_profile_is_compiled_twice(tmp_path, monkeypatch):
    session, compiled, compile_shapes = small_session(tmp_path), [], OpenvinoSession._compile

    def compile_noted(self, shapes):
        compiled.append(shapes["sample"][0])
        return compile_shapes(self, shapes)

    monkeypatch.setattr(OpenvinoSession, "_compile", compile_noted)
    for batch in (*range(1, 17), *range(16, 0, -1)):
        inputs = {"sample": torch.randn(batch, 8, 2, 3), "timestep": torch.arange(batch) * 60.0}
        scale = torch.where(inputs["timestep"] < 500, 2.0, 3.0)[:, None, None, None]
        assert torch.equal(session.run(inputs)["prediction"], inputs["sample"] * scale)
    assert compiled == [1, 2, 4, 8, 16]


def test_a_sample_does_not_depend_on_its_neighbours_timesteps(engine):
    denoiser = load_denoiser(engine)
    inputs = tiny_inputs("unet2d", 4)
    together = denoiser(**inputs).sample
    alone = torch.cat([denoiser(**{name: value[i : i + 1] for name, value in inputs.items()}).sample for i in range(4)])
    # Other batch sizes take other float kernels: sums differ in their last bits, and a tie may fall to the other side.
    family, _, model = tiny_model("unet2d")
    check_no_further(together, alone, family.forward(model, inputs))


def small_session(directory) -> OpenvinoSession:
    """A convolution whose result is multiplied by a scale that is looked up by timestep, as an engine directory holds it."""
    ov = pytest.importorskip("openvino")
    sample = ov.opset13.parameter([-1, 8, -1, -1], ov.Type.f32, name="sample")
    timestep = ov.opset13.parameter([-1], ov.Type.f32, name="timestep")
    scale = ov.opset13.parameter([-1, 1, 1, 1], ov.Type.f32, name="scale")
    weight = torch.eye(8)[:, :, None, None].numpy()
    product = ov.opset13.multiply(ov.opset13.convolution(sample, weight, [1, 1], [0, 0], [0, 0], [1, 1]), scale)
    nodes = {"sample": sample, "timestep": timestep, "scale": scale, "prediction": product}
    for name, node in nodes.items():
        node.output(0).set_names({name})
    model = ov.Model([ov.opset13.result(product)], [sample, timestep, scale])
    ov.save_model(model, directory / ENGINE_NAME, compress_to_fp16=False)
    rows = {ROW_NAME: torch.arange(1000, dtype=torch.int32) // 500, "scale": torch.tensor([2.0, 3.0]).reshape(2, 1, 1, 1)}
    save_file(rows, directory / TABLES_NAME)
    profile = {"batch": ShapeRange(1, 4, 16)}
    manifest = types.SimpleNamespace(
        adapters=None, outputs=("prediction",), profile=profile, build={"options": {"precision": "fp32", "threads": 1}}
    )
    return OpenvinoSession(ov, directory, manifest, torch.device("cpu"))


def test_shapes_that_change_at_every_call_do_not_grow_memory(tmp_path):
    session = small_session(tmp_path)

    def run(sizes):
        for size in sizes:
            inputs = {"sample": torch.ones(2, 8, size, size), "timestep": torch.tensor([0.0, 999.0])}
            found = session.run(inputs)["prediction"]
            assert torch.equal(found, inputs["sample"] * torch.tensor([2.0, 3.0])[:, None, None, None])
        return resident_mib()

    before = run(range(288, 293))
    # A compiled shape holds two maps of 2 x 8 x 256 x 256 float32 or more, 8 MiB: twenty-four of them would be 192 MiB.
    assert run(range(256, 280)) < before + 100
    assert len(session._models) == len(compiled_batches(ShapeRange(1, 4, 16)))
    session.close()
    assert not session._models


def test_calls_that_overlap_take_a_request_each_and_give_it_back(tmp_path):
    session = small_session(tmp_path)
    inputs = {"sample": torch.ones(1, 8, 4, 4), "timestep": torch.tensor([0.0])}
    session.run(inputs)
    (model,) = session._models.values()
    with model.slot() as first, model.slot() as second:
        assert first.request is not second.request
        assert session.run(inputs)["prediction"].unique().tolist() == [2.0]
    session.run(inputs)
    assert len(model._idle) == 3


def test_every_site_alone_gives_the_references_codes(artifact_w4a4, tmp_path):
    inputs = tiny_inputs("unet2d", 3)
    records = Reference(artifact_w4a4).record(inputs)
    onnx_cut_at_sites(artifact_w4a4, records, tmp_path / "cut")
    build_engine(tmp_path / "cut", tmp_path / "engine", backend="openvino")
    manifest, session = open_session(tmp_path / "engine")
    xs = {declared.name: records[declared.name.removesuffix(".x")].x for declared in manifest.inputs[1:]}
    outputs = session.run({"timestep": inputs["timestep"]} | xs)
    for site, record in records.items():
        assert torch.equal(outputs[f"{site}.codes"].float(), record.codes), site
        # One float32 rounding for the scale, one for the bias.
        torch.testing.assert_close(outputs[f"{site}.y"], record.y, rtol=1e-5, atol=1e-5 * float(record.y.abs().max()))


def test_the_timestep_stays_float32_when_the_rest_is_bfloat16(bf16_engine):
    _, session = open_session(bf16_engine)
    session.run(tiny_inputs("unet2d", 2))
    precisions = runtime_precisions(session)
    if "bf16" not in precisions.values():
        pytest.skip("this CPU has no bfloat16 instructions")
    path = [name for name in ("node_sin", "node_cos", "node_cat", "time_embedding.linear_1/scaled") if name in precisions]
    assert len(path) == 4
    assert {precisions[name] for name in path} == {"f32"}


def test_an_unknown_precision_is_refused(onnx_w4a4, tmp_path):
    with pytest.raises(InputError, match=r"--precision 'bf61': openvino has fp32 and bf16. Did you mean 'bf16'"):
        build_engine(onnx_w4a4, tmp_path / "engine", backend="openvino", options=BuildOptions(precision="bf61"))


def test_it_runs_on_the_cpu_only(engine):
    with pytest.raises(UnsupportedError, match="device='cpu'"):
        open_session(engine, device="cuda")


def test_a_graph_that_openvino_cannot_read_is_one_clear_error(onnx_w4a4, tmp_path):
    shutil.copytree(onnx_w4a4, tmp_path / "onnx")
    (tmp_path / "onnx" / GRAPH_NAME).write_bytes(b"no graph")
    Manifest.read(onnx_w4a4, kind="onnx").write(tmp_path / "onnx", [GRAPH_NAME])
    with pytest.raises(UnsupportedError, match=r"^OpenVINO \S+ cannot take the graph: .* Export it again"):
        build_engine(tmp_path / "onnx", tmp_path / "engine", backend="openvino")
    assert not (tmp_path / "engine").exists()


def test_a_cpu_without_bfloat16_is_a_warning(onnx_w4a4, tmp_path, monkeypatch):
    ov = pytest.importorskip("openvino")
    monkeypatch.setattr(ov.Core, "get_property", lambda *_: ["FP32", "INT8"])
    manifest = build_engine(onnx_w4a4, tmp_path / "engine", backend="openvino", options=BuildOptions(precision="bf16"))
    assert "no bfloat16 instructions" in manifest.build["warnings"][0]
