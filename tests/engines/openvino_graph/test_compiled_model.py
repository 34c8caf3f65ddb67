import pytest
import torch

from engines.openvino_graph.compiled_model import CompiledModel


class Request:
    """Records what it was given to read."""

    def __init__(self):
        self.given = []

    def set_tensor(self, name, tensor):
        self.given.append((name, tensor.data.ctypes.data))


class Compiled:
    def create_infer_request(self):
        return Request()


@pytest.fixture
def model():
    ov = pytest.importorskip("openvino")
    return ov, CompiledModel(ov, Compiled(), {"site/scale": (2, 1, 1)})


def test_a_request_is_used_by_one_call_at_a_time_and_again_by_the_next(model):
    _, compiled = model
    with compiled.slot() as one, compiled.slot() as two:
        assert one is not two
        assert one.looked_up.shape == (1, 2)
    with compiled.slot() as again:
        assert again is two or again is one


def test_adapter_weights_are_set_once_and_again_only_when_they_are_other_tensors(model):
    ov, compiled = model
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    with compiled.slot() as slot:
        for weight in (first, first, second):
            slot.hold(ov, {"lora.a.down": weight})
        assert slot.request.given[1:] == [("lora.a.down", first.data_ptr()), ("lora.a.down", second.data_ptr())]
