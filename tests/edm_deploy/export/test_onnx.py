import json

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
import pytest
import torch

from edm_deploy.artifact.reference import Reference
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact, save_graph
from edm_deploy.runtime.manifest import Manifest
from tests.conftest import TINY, artifact_by_hand, check_no_further, tiny_inputs, tiny_model

ort = pytest.importorskip("onnxruntime")


def relative_error(found, expected):
    return float((found - expected).pow(2).mean() / expected.pow(2).mean())


def run(path, inputs):
    session = ort.InferenceSession(path / "model.onnx", providers=["CPUExecutionProvider"])
    types = {
        value.name: {"tensor(float16)": np.float16, "tensor(float)": np.float32, "tensor(int64)": np.int64}[value.type]
        for value in session.get_inputs()
    }
    (prediction,) = session.run(None, {name: value.numpy().astype(types[name]) for name, value in inputs.items()})
    return torch.from_numpy(prediction).float()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Each kind and storage once: exporting is the slow part."""
    root = tmp_path_factory.mktemp("exported")
    for name, (kind, bits, dtype, storage) in CASES.items():
        onnx_from_artifact(artifact_by_hand(kind, bits, bits), root / name, dtype=dtype, weight_storage=storage)
    return root


CASES = {
    "w4a4-fp32": ("unet2d", 4, "fp32", "int8"),
    "w4a4-fp16-int4": ("unet2d", 4, "fp16", "int4"),
    "classes-w4a4-int4": ("unet2d-classes", 4, "fp32", "int4"),
    "condition-w8a8-fp32": ("unet2d-condition", 8, "fp32", "int8"),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("batch", "size"), [(1, 8), (4, 8), (2, 16)], ids=str)
def test_the_graph_computes_what_the_reference_computes(exported, name, batch, size):
    kind, bits, dtype, _ = CASES[name]
    family, _, model = tiny_model(kind)
    inputs = tiny_inputs(kind, batch, size)
    reference = Reference(artifact_by_hand(kind, bits, bits))(inputs)
    expected = family.forward(model, inputs)
    allowed = relative_error(reference, expected)
    found = run(exported / name, inputs)
    if dtype == "fp32":
        assert relative_error(found, reference) <= allowed
    else:
        # float16 between the sites flips codes, which draws the rounding noise anew: as far from the float model, not near the reference.
        assert relative_error(found, expected) <= 1.25 * allowed


@pytest.mark.parametrize("name", CASES)
def test_checker_and_shape_inference_are_clean(exported, name):
    path = exported / name / "model.onnx"
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    assert inferred.opset_import[0].version == 21
    assert len(inferred.graph.value_info) > 100


def test_fractional_timesteps_are_rounded_for_the_row_and_kept_for_the_model(exported):
    inputs = tiny_inputs("unet2d") | {"timestep": torch.tensor([0.4, 473.7, 998.6])}
    reference = Reference(artifact_by_hand("unet2d"))(inputs)
    family, _, model = tiny_model("unet2d")
    check_no_further(run(exported / "w4a4-fp32", inputs), reference, family.forward(model, inputs))


def test_packed_weights_make_the_file_smaller(exported):
    sizes = {name: (exported / name / "model.onnx").stat().st_size for name in CASES}
    assert sizes["w4a4-fp16-int4"] < sizes["w4a4-fp32"]


def test_the_manifest_lists_what_was_written(exported):
    manifest = Manifest.read(exported / "w4a4-fp32", kind="onnx")
    artifact = artifact_by_hand("unet2d")
    assert manifest.artifact == artifact.digest
    assert manifest.scheme == "W4A4"
    assert {name: site.scheme for name, site in manifest.sites.items()} == {name: site.scheme for name, site in artifact.sites.items()}
    assert set(manifest.files) == {"model.onnx", "model_index.json", "scheduler/scheduler_config.json"}


def test_the_same_artifact_exports_to_the_same_bytes(exported, tmp_path):
    onnx_from_artifact(artifact_by_hand("unet2d"), tmp_path / "again")
    assert (tmp_path / "again" / "model.onnx").read_bytes() == (exported / "w4a4-fp32" / "model.onnx").read_bytes()


def test_a_changed_graph_is_found(exported, tmp_path):
    import shutil

    shutil.copytree(exported / "w4a4-fp32", tmp_path / "x")
    with (tmp_path / "x" / "model.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(ArtifactError, match=r"model\.onnx does not match manifest\.json"):
        Manifest.read(tmp_path / "x", kind="onnx")


@pytest.mark.parametrize("option", [{"dtype": "fp8"}, {"weight_storage": "int2"}])
def test_an_unknown_type_is_refused_before_any_work(option, tmp_path):
    with pytest.raises(InputError, match="expected fp32 or fp16, int8 or int4"):
        onnx_from_artifact(artifact_by_hand(), tmp_path / "x", **option)
    assert list(tmp_path.iterdir()) == []


def test_large_weights_are_in_a_second_file(tmp_path, monkeypatch):
    monkeypatch.setattr("edm_deploy.export.onnx.EXTERNAL_DATA_BYTES", 100)
    manifest = onnx_from_artifact(artifact_by_hand(), tmp_path / "x")
    assert "model.onnx.data" in manifest.files
    inputs = tiny_inputs("unet2d")
    family, _, model = tiny_model("unet2d")
    check_no_further(run(tmp_path / "x", inputs), Reference(artifact_by_hand())(inputs), family.forward(model, inputs))


def test_the_manifest_is_plain_json(exported):
    assert json.loads((exported / "w4a4-fp32" / "manifest.json").read_text())["kind"] == "onnx"


def test_all_tiny_unets_are_exported():
    """The transformers are exported in the tests of their families."""
    assert {kind for kind, *_ in CASES.values()} == {kind for kind in TINY if kind.startswith("unet2d")}


@pytest.mark.parametrize("beside", [True, False], ids=["data beside the graph", "in one file"])
def test_a_graph_of_mixed_types_is_not_written(beside, tmp_path, monkeypatch):
    monkeypatch.setattr("edm_deploy.export.onnx.EXTERNAL_DATA_BYTES", 0 if beside else 1 << 28)
    header = '<ir_version: 10, opset_import: ["" : 21]> g (float[N] x, float16[N] h) => (float[M] y)'
    text = header + " { c = Constant <value_floats = [1.0]> () z = Add (x, c) y = Concat <axis = 0> (z, h) }"
    model = ir.from_onnx_text(text)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    with pytest.raises(UnsupportedError, match=r"not valid ONNX: .*Concat"):
        save_graph(model, tmp_path)
