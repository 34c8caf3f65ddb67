import onnx
import pytest

from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.graph_names import GRAPH_NAME, OUTPUT, ROW_NAME, TABLE_COLUMNS, biased, layer_node, lookup, rescaled
from tests.conftest import artifact_by_hand


def test_names_are_those_of_graphs_on_disk():
    """A change would break engines' builds from ONNX directories of earlier releases."""
    assert (layer_node("a.b"), rescaled("a.b"), biased("a.b")) == ("a.b/sum", "a.b/rescaled", "a.b/biased")
    assert [lookup("a.b", column) for column in TABLE_COLUMNS] == ["a.b/scale", "a.b/inv_scale", "a.b/qmin", "a.b/qmax"]
    assert (GRAPH_NAME, OUTPUT, ROW_NAME) == ("model.onnx", "prediction", "row")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    artifact = artifact_by_hand("unet2d")
    out = tmp_path_factory.mktemp("exported") / "onnx"
    manifest = onnx_from_artifact(artifact, out)
    graph = onnx.load(out / GRAPH_NAME).graph
    return artifact, manifest, {node.name: node for node in graph.node}


def test_every_lookup_of_a_table_has_its_name(exported):
    artifact, _, nodes = exported
    names = {lookup(site, column) for site in artifact.sites for column in TABLE_COLUMNS}
    by_row = {node.name for node in nodes.values() if node.op_type == "Gather" and node.input[1] == ROW_NAME}
    assert by_row == names & set(nodes)
    assert len(by_row) > len(artifact.sites)


def test_a_site_is_found_by_the_name_of_its_layer_and_of_its_rescaling(exported):
    artifact, manifest, nodes = exported
    for site in artifact.sites:
        assert manifest.sites[site].node == layer_node(site)
        assert nodes[layer_node(site)].op_type in ("Conv", "MatMul")
        assert nodes[rescaled(site)].op_type == "Mul"
        assert nodes[biased(site)].op_type == "Add"
