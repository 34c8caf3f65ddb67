import torch
from torch import nn

from engines.torch_graph.fx_helpers import aten, clean, merge_equal, same_shape, value_of
from tests.engines.rewritten import drafted


def test_what_the_tracer_leaves_behind_is_taken_out():
    class Contiguous(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2).contiguous()

    model = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5).eval(), Contiguous(), nn.Flatten(1))
    program = torch.export.export(model.eval(), (torch.randn(2, 3, 5),), strict=False)
    graph = program.module(check_guards=False).graph
    clean(graph, torch.device("cpu"))
    targets = {node.target for node in graph.nodes}
    assert not targets & {aten.dropout.default, aten.view.default, aten.contiguous.default, aten._assert_tensor_metadata.default}


def test_a_slice_of_everything_is_taken_out_and_a_part_is_not():
    class Slices(nn.Module):
        def forward(self, x):
            return x[:, None, :], x[:, :3], x[:, 2:], x[:, ::2]

    graph = torch.export.export(Slices(), (torch.randn(2, 5),), strict=False).module(check_guards=False).graph
    clean(graph, torch.device("cpu"))
    slices = [node.args for node in graph.nodes if node.target is aten.slice.Tensor]
    assert [arguments[1] for arguments in slices] == [1, 1, 1]


def test_equal_nodes_are_merged_and_random_or_different_ones_are_not():
    class Repeats(nn.Module):
        def forward(self, x):
            same = x.relu() + x.relu()
            drawn = torch.rand_like(x) + torch.rand_like(x)
            return same + drawn, x * 1, x * 1.0

    graph = torch.export.export(Repeats(), (torch.randn(2, 5),), strict=False).module(check_guards=False).graph
    merge_equal(graph)
    counts = {name: sum(getattr(node.target, "__name__", "").startswith(name) for node in graph.nodes) for name in ("relu", "rand", "mul")}
    assert counts == {"relu": 1, "rand": 2, "mul": 2}


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
