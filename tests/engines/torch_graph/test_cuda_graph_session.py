import torch
from torch import fx, nn

from engines.torch_graph.cuda_graph_session import CAPTURED_SHAPES, Captured, CudaSession


def session(**options) -> CudaSession:
    class Sums(nn.Module):
        def forward(self, x, y):
            return (x.permute(0, 2, 3, 1).contiguous() + y,)

    return CudaSession(fx.symbolic_trace(Sums()), ["x", "y"], ["sum"], torch.device("cpu"), **options)


def test_on_the_cpu_it_runs_eagerly_and_names_its_outputs():
    x = torch.randn(2, 3, 4, 4)
    found = session().run({"y": torch.ones(3), "x": x})
    assert torch.equal(found["sum"], x.permute(0, 2, 3, 1) + 1)


class FakeGraph:
    """Stands for torch.cuda.CUDAGraph: what is replayed reads and writes fixed memory."""

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs

    def replay(self):
        self.outputs["sum"].copy_(self.inputs["x"] * 2)


def test_shapes_are_captured_once_and_the_oldest_makes_room(monkeypatch):
    recorded = []

    def record(self, inputs):
        recorded.append(tuple(inputs["x"].shape))
        static, outputs = {"x": inputs["x"].clone()}, {"sum": torch.empty_like(inputs["x"])}
        return Captured(FakeGraph(static, outputs), static, outputs)

    import contextlib

    monkeypatch.setattr(CudaSession, "_record", record)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    module = fx.symbolic_trace(nn.Identity())
    capturing = CudaSession(module, ["x"], ["sum"], torch.device("cuda"))
    first = capturing.run({"x": torch.ones(1)})["sum"]
    assert torch.equal(capturing.run({"x": torch.full((1,), 5.0)})["sum"], torch.full((1,), 10.0))
    assert torch.equal(first, torch.full((1,), 2.0)), "a replay must not change what was returned before"
    for size in range(2, CAPTURED_SHAPES + 2):
        capturing.run({"x": torch.ones(size)})
    capturing.run({"x": torch.ones(1)})
    assert recorded == [(size,) for size in (*range(1, CAPTURED_SHAPES + 2), 1)]
