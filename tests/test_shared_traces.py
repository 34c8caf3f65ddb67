"""The graphs that the suite shares are the ones that the exporter would make now."""

import onnx_ir as ir
import pytest
import torch

from edm_deploy.network.restructure import PUBLISHED
from tests.conftest import tiny_model
from tests.shared_traces import exported_program, key, path_of, shared_program, shared_trace, trace

KIND = "dit"


@pytest.fixture(scope="module")
def fresh():
    family, config, _ = tiny_model(KIND)
    return trace(family, config, torch.float32)


def structure_of(model: ir.Model) -> bytes:
    """The serialized graph, with the types and shapes of its initializers but not their data: a trace leaves weights uninitialised."""
    graph = ir.to_proto(model).graph
    for tensor in graph.initializer:
        tensor.ClearField("raw_data")
    return graph.SerializeToString(deterministic=True)


def test_a_shared_graph_is_the_traced_one_and_each_caller_has_its_own(fresh):
    family, config, _ = tiny_model(KIND)
    one, other = (shared_trace(family, config, torch.float32) for _ in range(2))
    assert structure_of(one) == structure_of(other) == structure_of(fresh)
    one.graph.inputs[0].name = "renamed"
    assert other.graph.inputs[0].name == "sample"


def test_a_shared_graph_is_stored_under_its_sources_and_versions():
    family, config, _ = tiny_model(KIND)
    shared_trace(family, config, torch.float32)
    wanted = key(family, config, PUBLISHED, torch.float32)
    assert path_of(wanted).is_file()
    assert path_of(wanted) != path_of(key(family, config, PUBLISHED, torch.float16))


def test_exporting_to_onnx_leaves_a_shared_program_as_it_is(fresh):
    family, config, _ = tiny_model(KIND)
    program = shared_program(family, config, torch.float32)  # what `fresh` was exported from
    assert shared_program(family, config, torch.float32, input_dtype=torch.float32) is program
    assert str(program.graph) == str(exported_program(family, config, torch.float32).graph)
