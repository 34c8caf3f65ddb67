import ctypes
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from engines.nvidia import tensorrt_backend
from engines.nvidia.tensorrt_backend import NvinferSession


class FakeContext:
    """An execution context of `y = 2 * x` on one float32 vector, with TensorRT's one set of shapes and addresses."""

    def __init__(self):
        self.shapes, self.addresses, self.accepts = {}, {}, True

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def get_tensor_shape(self, name):
        return self.shapes["x"]

    def execute_async_v3(self, stream):
        time.sleep(0.001)
        (count,) = self.shapes["x"]
        x, y = (ctypes.cast(self.addresses[name], ctypes.POINTER(ctypes.c_float)) for name in "xy")
        for index in range(count):
            y[index] = 2 * x[index]
        return self.accepts


def fake_module(context, engine=True):
    """What the session calls of TensorRT's Python API."""
    opened = types.SimpleNamespace(
        create_execution_context=lambda: context, get_tensor_dtype=lambda name: types.SimpleNamespace(name="FLOAT")
    )

    class Logger:
        WARNING = 1

        def __init__(self, severity):
            pass

    class Runtime:
        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, content):
            return opened if engine else None

    return types.SimpleNamespace(__name__="tensorrt", __version__="11", Logger=Logger, Runtime=Runtime)


@pytest.fixture
def open_fake(streams, tmp_path):
    """Opens a session on FakeContext, whose tensors are on the CPU."""
    path = tmp_path / tensorrt_backend.ENGINE_NAME
    path.write_bytes(b"engine")
    manifest = types.SimpleNamespace(graph_inputs=[types.SimpleNamespace(name="x")], outputs=("y",))
    return lambda module: NvinferSession(module, path, manifest, torch.device("cpu"))


def test_two_threads_on_one_context_each_get_their_own_result(open_fake):
    session = open_fake(fake_module(FakeContext()))

    def hammer(first):
        return [session.run({"x": torch.full((first,), float(value))})["y"].tolist() for value in range(30)]

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(hammer, (3, 5)))
    assert results == [[[2.0 * value] * first for value in range(30)] for first in (3, 5)]


def test_closing_waits_for_the_gpu_and_drops_the_engine(open_fake, streams):
    session = open_fake(fake_module(FakeContext()))
    session.run({"x": torch.ones(2)})
    with session:
        pass
    (stream,) = streams.values()
    assert stream.enqueued == ["record 1", "synchronize 1"]
    assert (session._context, session._engine, session._runtime) == (None, None, None)
    with pytest.raises(InputError, match="has been closed"):
        session.run({"x": torch.ones(2)})


def test_an_engine_that_tensorrt_refuses_to_read_is_one_clear_error(open_fake):
    with pytest.raises(UnsupportedError, match=r"engine\.trt was refused by tensorrt 11 on this GPU\. Build it again here"):
        open_fake(fake_module(FakeContext(), engine=False))


def test_an_engine_that_cannot_be_enqueued_is_an_error(open_fake):
    context = FakeContext()
    context.accepts = False
    with pytest.raises(RuntimeError, match="could not enqueue"):
        open_fake(fake_module(context)).run({"x": torch.ones(1)})
