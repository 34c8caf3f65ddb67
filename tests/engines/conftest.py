"""ONNX directories of the tiny model, one of them outside what TensorRT-RTX computes in integers, and CUDA streams without a GPU."""

from __future__ import annotations

import contextlib
import shutil
import threading
import types
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.manifest import Manifest


@pytest.fixture(scope="session")
def onnx_w4a4_packed(artifact_w4a4: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as packed INT4."""
    path = tmp_path_factory.mktemp("onnx") / "w4a4_int4"
    onnx_from_artifact(artifact_w4a4, path, weight_storage="int4")
    return path


@pytest.fixture(scope="session")
def onnx_w4a4_fp16(artifact_w4a4: Artifact, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float16 between the sites."""
    path = tmp_path_factory.mktemp("onnx") / "w4a4_fp16"
    onnx_from_artifact(artifact_w4a4, path, dtype="fp16")
    return path


class FakeStream:
    """A CUDA stream that notes what is enqueued on it: `wait <event>` and `record <event>`, events numbered as they are recorded."""

    events = 0

    def __init__(self) -> None:
        self.cuda_stream = id(self)
        self.enqueued: list[str] = []

    def wait_event(self, event: types.SimpleNamespace) -> None:
        self.enqueued.append(f"wait {event.number}")

    def record_event(self) -> types.SimpleNamespace:
        FakeStream.events += 1
        number = FakeStream.events
        self.enqueued.append(f"record {number}")
        return types.SimpleNamespace(number=number, synchronize=lambda: self.enqueued.append(f"synchronize {number}"))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> dict[int, FakeStream]:
    """torch.cuda with a current stream for each thread, by the thread's id, on a machine without a GPU."""
    made: dict[int, FakeStream] = {}
    monkeypatch.setattr(FakeStream, "events", 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: made.setdefault(threading.get_ident(), FakeStream()))
    return made


@pytest.fixture
def with_runtime_scale(onnx_w4a4: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the graph in which one site's Q/DQ scale is computed at run time: the form that TensorRT-RTX does not compute in integers."""

    def make(site: str) -> Path:
        path = tmp_path / "runtime_scale"
        shutil.copytree(onnx_w4a4, path)
        model = onnx.load(path / GRAPH_NAME)
        at = next(index for index, node in enumerate(model.graph.node) if node.name == f"{site}/codes")
        scale = [
            onnx.helper.make_node("ReduceMax", ["timestep"], ["runtime.largest"], keepdims=0),
            onnx.helper.make_node("Exp", ["runtime.largest"], ["runtime.scale"]),
        ]
        for node in model.graph.node:
            if node.name in (f"{site}/codes", f"{site}/x_dq"):
                node.input[1] = "runtime.scale"
        for node in reversed(scale):
            model.graph.node.insert(at, node)
        onnx.save(model, path / GRAPH_NAME)
        manifest = Manifest.read(onnx_w4a4, kind="onnx")
        manifest.write(path, list(manifest.files))
        return path

    return make
