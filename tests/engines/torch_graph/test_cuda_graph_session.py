import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import fx, nn

from edm_deploy.errors import InputError
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
    """torch.cuda.CUDAGraph's fixed memory: a replay reads its inputs and overwrites its outputs, slowly enough that another thread comes between."""

    def __init__(self, inputs, outputs):
        self.inputs, self.outputs = inputs, outputs

    def replay(self):
        doubled = self.inputs["x"] * 2
        time.sleep(0.001)
        self.outputs["sum"].copy_(doubled)
        time.sleep(0.001)


@pytest.fixture
def recorded(monkeypatch, streams):
    """Shapes of x that sessions have captured, with FakeGraph in the place of torch.cuda.CUDAGraph."""
    shapes = []

    def record(self, inputs):
        shapes.append(tuple(inputs["x"].shape))
        static, outputs = {"x": inputs["x"].clone()}, {"sum": torch.empty_like(inputs["x"])}
        return Captured(FakeGraph(static, outputs), static, outputs)

    monkeypatch.setattr(CudaSession, "_record", record)
    return shapes


def capturing_session() -> CudaSession:
    return CudaSession(fx.symbolic_trace(nn.Identity()), ["x"], ["sum"], torch.device("cuda"))


def test_shapes_are_captured_once_and_the_oldest_makes_room(recorded):
    capturing = capturing_session()
    first = capturing.run({"x": torch.ones(1)})["sum"]
    assert torch.equal(capturing.run({"x": torch.full((1,), 5.0)})["sum"], torch.full((1,), 10.0))
    assert torch.equal(first, torch.full((1,), 2.0)), "a replay must not change what was returned before"
    for size in range(2, CAPTURED_SHAPES + 2):
        capturing.run({"x": torch.ones(size)})
    capturing.run({"x": torch.ones(1)})
    assert recorded == [(size,) for size in (*range(1, CAPTURED_SHAPES + 2), 1)]


def test_two_threads_on_one_captured_graph_each_get_their_own_result(recorded):
    capturing, start = capturing_session(), threading.Barrier(2)

    def hammer(first):
        start.wait()
        return [capturing.run({"x": torch.full((1,), float(value))})["sum"].item() for value in range(first, first + 30)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(hammer, (0, 100)))
    assert results == [[2.0 * value for value in range(first, first + 30)] for first in (0, 100)]
    assert recorded == [(1,)]


def test_closing_waits_for_the_gpu_and_drops_graphs_and_module(recorded, streams):
    capturing = capturing_session()
    capturing.run({"x": torch.ones(1)})
    capturing.close()
    (stream,) = streams.values()
    assert stream.enqueued[-1] == "synchronize 1"
    assert (len(capturing._captured), capturing._module, capturing._pool) == (0, None, None)
    with pytest.raises(InputError, match="has been closed"):
        capturing.run({"x": torch.ones(1)})


def test_an_allocation_of_another_thread_does_not_end_a_capture(monkeypatch):
    """torch's default, global, would: cudaMalloc anywhere in the process is then an error of the capturing thread."""
    modes = []

    class Stream:
        def wait_stream(self, other):
            pass

    def graph(captured, pool=None, stream=None, capture_error_mode="global"):
        modes.append(capture_error_mode)
        return contextlib.nullcontext()

    for name, fake in {
        "Stream": lambda device: Stream(),
        "current_stream": lambda device: Stream(),
        "stream": contextlib.nullcontext,
        "graph_pool_handle": lambda: None,
        "CUDAGraph": object,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    capturing = CudaSession(fx.symbolic_trace(nn.Identity()), ["x"], ["sum"], torch.device("cuda"))
    monkeypatch.setattr(capturing, "_eager", lambda inputs: {"sum": inputs["x"]})
    capturing._record({"x": torch.ones(1)})
    assert modes == ["thread_local"]
