import onnx_ir as ir
import pytest
import torch

from edm_deploy import models, registry
from edm_deploy.errors import UnsupportedError
from edm_deploy.export import trace as tracing
from edm_deploy.export.trace import find_sites, trace
from edm_deploy.network.meta_model import meta_model
from tests.conftest import TINY, tiny_model
from tests.shared_traces import exported_program, shared_trace

KIND = "pixart"


@pytest.fixture(scope="module")
def graph():
    """Traced in every run, unlike the graphs that tests share."""
    family, config, _ = tiny_model(KIND)
    return trace(family, config, torch.float32)


def test_every_site_is_found_by_its_parameter_name(graph):
    family, config, _ = tiny_model(KIND)
    names = list(family.sites(meta_model(family, config)))
    sites = find_sites(graph.graph, names)
    assert list(sites) == names
    assert {nodes.node.op_type for nodes in sites.values()} == {"Conv", "Gemm", "MatMul"}


def test_inputs_keep_their_names_and_plain_dynamic_dimensions(graph):
    described = [(value.name, str(value.dtype), str(value.shape)) for value in graph.graph.inputs]
    assert described == [
        ("sample", "FLOAT", "[batch,4,height,width]"),
        ("timestep", "FLOAT", "[batch]"),
        ("encoder_hidden_states", "FLOAT", "[batch,tokens,12]"),
        ("encoder_attention_mask", "FLOAT", "[batch,tokens]"),
    ]
    assert str(graph.graph.outputs[0].shape) == "[batch,8,height,width]"


def structure_of(model: ir.Model) -> bytes:
    """The serialized graph without the data of its initializers (a trace leaves weights uninitialised) and torch's notes (whose order varies)."""
    graph = ir.to_proto(model).graph
    graph.ClearField("metadata_props")
    for tensor in graph.initializer:
        tensor.ClearField("raw_data")
    return graph.SerializeToString(deterministic=True)


def test_the_graph_that_tests_share_is_the_one_that_is_traced_now(graph):
    family, config, _ = tiny_model(KIND)
    one, other = (shared_trace(family, config, torch.float32) for _ in range(2))
    assert structure_of(one) == structure_of(other) == structure_of(graph)
    one.graph.inputs[0].name = "renamed"
    assert other.graph.inputs[0].name == "sample", "each caller has its own"


def test_a_layer_that_feeds_no_product_is_named(graph):
    with pytest.raises(UnsupportedError, match="Site 'nowhere': its weight feeds nothing"):
        find_sites(graph.graph, ["nowhere"])


def test_a_model_that_cannot_be_traced_is_one_clear_error(monkeypatch):
    family, config, _ = tiny_model("unet2d")
    monkeypatch.setattr(tracing, "exported_program", exported_program)  # no other test's program
    monkeypatch.setattr(type(family), "forward", lambda self, model, inputs: inputs["sample"].tolist())
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot trace UNet2DModel"):
        trace(family, config, torch.float32)


def test_all_families_are_among_the_tiny_models():
    assert {name for name, _ in TINY.values()} == set(registry.names(models))
