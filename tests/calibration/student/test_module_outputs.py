import pytest
import torch
from torch import nn

from calibration.student.module_outputs import capture_outputs, input_hooks, module_calls, tensors_of


def test_captured_outputs_are_the_last_tensor_of_each_module_and_hooks_are_removed():
    class Two(nn.Module):
        def forward(self, x):
            return None, x, x + 1

    model = nn.Sequential(nn.Identity(), Two())
    with capture_outputs(model, ["0", "1"]) as outputs:
        model(torch.zeros(1))
        assert {name: float(value) for name, value in outputs.items()} == {"0": 0.0, "1": 1.0}
    assert not model[1]._forward_hooks


class Network(nn.Module):
    """Adds 1 in each of three layers, and counts how many ran."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(*(Plus() for _ in range(3)))

    def forward(self, inputs):
        return self.model(inputs["x"])


class Plus(nn.Module):
    runs = 0

    def forward(self, x):
        self.runs += 1
        return x + 1


def test_input_hooks_receive_module_and_arguments_and_are_removed_even_after_an_error():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("in the forward pass")

    model, calls = nn.Sequential(nn.Identity(), Failing()), []
    hooks = [(layer, lambda *call: calls.append(call)) for layer in model]
    with pytest.raises(RuntimeError, match="in the forward pass"), input_hooks(hooks):
        model(torch.tensor([-1.0]))
    assert calls == [(layer, (torch.tensor([-1.0]),)) for layer in model]
    assert not any(layer._forward_pre_hooks for layer in model)


@pytest.mark.parametrize(("results", "runs"), [(False, [1, 0, 0]), (True, [1, 1, 0])])
def test_a_pass_ends_at_the_last_module_whose_call_is_captured(results, runs):
    network = Network()
    calls = module_calls(network, {"x": torch.zeros(1)}, ["0", "1"], results=results)
    assert [float(call if results else call[0][0]) for call in calls] == ([1.0, 2.0] if results else [0.0, 1.0])
    assert [layer.runs for layer in network.model] == runs
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in network.model)


def test_the_tensors_of_a_result_are_listed_without_its_empty_entries():
    assert [float(value) for value in tensors_of((torch.tensor(1.0), None, {"y": torch.tensor(2.0)}))] == [1.0, 2.0]
