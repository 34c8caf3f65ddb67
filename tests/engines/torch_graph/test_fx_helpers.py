import torch
from torch import nn

from engines.torch_graph.fx_helpers import aten, clean, same_shape, value_of
from tests.engines.rewritten import drafted


def test_what_the_tracer_leaves_behind_is_taken_out():
    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5).eval(), nn.Flatten(1))
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 5),), strict=False)
    graph = program.module(check_guards=False).graph
    clean(graph, torch.device("cpu"))
    targets = {node.target for node in graph.nodes}
    assert not targets & {aten.dropout.default, aten.view.default, aten._assert_tensor_metadata.default}


def test_a_device_in_the_traced_code_becomes_the_one_it_runs_on():
    class Positions(nn.Module):
        def forward(self, x):
            return x + torch.arange(5, device=x.device)

    graph = torch.export.export(Positions(), (torch.randn(2, 5),), strict=False).module(check_guards=False).graph
    clean(graph, torch.device("meta"))
    assert [node.kwargs["device"] for node in graph.nodes if "device" in node.kwargs] == [torch.device("meta")]


def test_shapes_are_compared_whatever_the_batch():
    graph = drafted(nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 6)), {}, torch.randn(3, 5).half()).graph
    first, relu, second = (node for node in graph.nodes if node.op == "call_function" and "meta" in dir(node) and "val" in node.meta)
    assert same_shape(first, relu)
    assert not same_shape(relu, second)
    assert value_of(second).dtype == torch.float16
