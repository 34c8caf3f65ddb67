"""The graphs that the suite shares; that they are those that are traced now is in tests/edm_deploy/export/test_trace.py."""

import torch

from edm_deploy.network.restructure import PUBLISHED
from tests.conftest import tiny_model
from tests.shared_traces import exported_program, key, path_of, shared_program, shared_trace

KIND = "pixart"


def test_a_graph_is_stored_by_model_and_dtype():
    family, config, _ = tiny_model(KIND)
    shared_trace(family, config, torch.float32)
    wanted = key(family, config, PUBLISHED, torch.float32)
    assert path_of(wanted).is_file()
    assert path_of(wanted) != path_of(key(family, config, PUBLISHED, torch.float16))


def test_exporting_to_onnx_leaves_a_shared_program_as_it_is():
    family, config, _ = tiny_model(KIND)
    shared_trace(family, config, torch.float32)  # from the shared program, unless the graph is stored
    program = shared_program(family, config, torch.float32)
    assert shared_program(family, config, torch.float32, input_dtype=torch.float32) is program
    assert str(program.graph) == str(exported_program(family, config, torch.float32).graph)
