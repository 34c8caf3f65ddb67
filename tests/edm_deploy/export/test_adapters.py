"""The graph with adapter branches; what it computes is compared with the reference in `tests/contracts/test_adapters.py`."""

import onnx
import pytest
import torch

from edm_deploy.adapters.site_weights import FACTORS_NAME, adapters_of
from edm_deploy.errors import ArtifactError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.graph_names import OUTPUT
from edm_deploy.runtime.manifest import Manifest
from tests.conftest import artifact_by_hand


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    artifact = artifact_by_hand("unet2d")
    adapters = adapters_of(artifact, rank=3, pattern="attentions|conv_out")
    path = tmp_path_factory.mktemp("adapters") / "onnx"
    return onnx_from_artifact(artifact, path, dtype="fp16", adapters=adapters), path


def test_its_weights_are_inputs_of_the_graphs_type_and_its_manifest_states_them(exported):
    manifest, path = exported
    graph = onnx.load(path / "model.onnx").graph
    declared = {entry.name: entry.dims for entry in manifest.graph_inputs}
    found = {value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim) for value in graph.input}
    assert found == declared
    assert {value.type.tensor_type.elem_type for value in graph.input if value.name.startswith("lora.")} == {onnx.TensorProto.FLOAT16}
    assert [value.name for value in graph.output] == [OUTPUT]  # also where the last layer has a branch
    assert manifest == Manifest.read(path, kind="onnx")
    assert not (path / FACTORS_NAME).exists()  # no layer has a pre-scale


def test_a_graph_without_adapters_is_as_before_and_so_is_its_manifest(exported, tmp_path):
    onnx_from_artifact(artifact_by_hand("unet2d"), tmp_path / "onnx", dtype="fp16")
    manifest = Manifest.read(tmp_path / "onnx", kind="onnx")
    assert manifest.adapters is None
    assert not [value.name for value in onnx.load(tmp_path / "onnx" / "model.onnx").graph.input if value.name.startswith("lora")]
    plain = {node.name for node in onnx.load(tmp_path / "onnx" / "model.onnx").graph.node}
    assert plain <= {node.name for node in onnx.load(exported[1] / "model.onnx").graph.node}


def test_a_damaged_description_is_refused(exported, tmp_path):
    import json
    import shutil

    path = tmp_path / "onnx"
    for change, message in (
        (("rank", 0), "rank"),
        (("rank", "x"), "rank"),
        (("layers", {"a": [-1]}), "layers"),
        (("layers", {"a": [2, 2]}), "layers has 'a'"),
    ):
        shutil.copytree(exported[1], path, dirs_exist_ok=True)
        content = json.loads((path / "manifest.json").read_text())
        content["adapters"][change[0]] = change[1]
        (path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(ArtifactError, match=f"adapters.*{message}"):
            Manifest.read(path, kind="onnx")


def test_the_graph_runs_in_float16_types_only_where_they_meet(exported):
    """onnx's own full check: ONNX adds no two types."""
    onnx.checker.check_model(exported[1] / "model.onnx", full_check=True)
    assert torch.float16 == exported[0].torch_dtype
