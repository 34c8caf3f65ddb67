import pytest
import torch

from edm_deploy import models, registry
from edm_deploy.errors import UnsupportedError
from edm_deploy.export.trace import find_sites, trace
from edm_deploy.network.family import meta_model
from tests.conftest import TINY, tiny_model


@pytest.fixture(scope="module")
def graph():
    family, config, _ = tiny_model("unet2d-condition")
    return trace(family, config, torch.float16)


def test_every_site_is_found_by_its_parameter_name(graph):
    family, config, _ = tiny_model("unet2d-condition")
    names = list(family.sites(meta_model(family, config)))
    sites = find_sites(graph.graph, names)
    assert list(sites) == names
    assert {nodes.node.op_type for nodes in sites.values()} == {"Conv", "Gemm", "MatMul"}


def test_inputs_keep_their_names_and_plain_dynamic_dimensions(graph):
    described = [(value.name, str(value.dtype), str(value.shape)) for value in graph.graph.inputs]
    assert described == [
        ("sample", "FLOAT16", "[batch,4,height,width]"),
        ("timestep", "FLOAT", "[batch]"),
        ("encoder_hidden_states", "FLOAT16", "[batch,tokens,12]"),
    ]
    assert str(graph.graph.outputs[0].shape) == "[batch,4,height,width]"


def test_a_layer_that_feeds_no_product_is_named(graph):
    with pytest.raises(UnsupportedError, match="Site 'nowhere': its weight feeds nothing"):
        find_sites(graph.graph, ["nowhere"])


def test_a_model_that_cannot_be_traced_is_one_clear_error(monkeypatch):
    family, config, _ = tiny_model("unet2d")
    monkeypatch.setattr(type(family), "forward", lambda self, model, inputs: inputs["sample"].tolist())
    with pytest.raises(UnsupportedError, match=r"torch\.export cannot trace UNet2DModel"):
        trace(family, config, torch.float32)


def test_all_families_are_among_the_tiny_models():
    assert {name for name, _ in TINY.values()} == set(registry.names(models))
