"""Tiny engines that are served, built once: a pixel-space model by hand on two backends, and a guided text model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from edm_deploy.artifact.reference import Reference
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.graph_names import OUTPUT
from edm_deploy.runtime.backend import BuildOptions, Session
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.serving import model as model_module
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from edm_deploy.storage.directories import INDEX_FILE, SCHEDULER_FILE, read_json
from engines import build_engine
from tests.conftest import artifact_by_hand

SLOTS = 4


class ReferenceSession(Session):
    """The reference executor as the session of an engine."""

    def __init__(self, reference: Reference) -> None:
        super().__init__(torch.device("cpu"))
        self.reference = reference

    def _infer(self, inputs):
        return {OUTPUT: self.reference(inputs)}

    def _release(self) -> None:
        pass


@pytest.fixture(scope="session")
def engine(onnx_w4a4, tmp_path_factory) -> Path:
    """A pixel-space W4A4 engine of onnxruntime."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("served") / "ort"
    build_engine(onnx_w4a4, path, backend="ort", options=BuildOptions(profile={"batch": ShapeRange(1, SLOTS, 6)}))
    return path


@pytest.fixture(scope="session")
def text_engine(tmp_path_factory) -> tuple[Path, Path]:
    """An engine of a tiny Stable Diffusion that takes 8 to 16 latents a side, and the pipeline that has its text encoder and VAE."""
    from tests.tiny_pipelines import saved

    pytest.importorskip("onnxruntime")
    root = tmp_path_factory.mktemp("served-text")
    source = saved(root / "source")
    files = {name: read_json(source / name, what="pipeline") for name in (INDEX_FILE, SCHEDULER_FILE)}
    onnx_from_artifact(replace(artifact_by_hand("unet2d-condition", 8, 8), pipeline=files), root / "onnx")
    sizes = {"batch": ShapeRange(1, SLOTS, SLOTS), "height": ShapeRange(8, 8, 16), "width": ShapeRange(8, 8, 16)}
    build_engine(root / "onnx", root / "engine", backend="ort", options=BuildOptions(profile=sizes))
    return root / "engine", source


@pytest.fixture(scope="session")
def model(engine) -> Iterator[ServedModel]:
    served = ServedModel(engine, name="tiny", slots=SLOTS)
    yield served
    served.close()


@pytest.fixture(scope="session")
def text_model(text_engine) -> Iterator[ServedModel]:
    served = ServedModel(text_engine[0], name="text", slots=SLOTS, source=text_engine[1])
    yield served
    served.close()


@pytest.fixture(scope="session")
def served_on(engine, onnx_w4a4, artifact_w4a4, tmp_path_factory) -> Callable[[str], ServedModel]:
    """Opens the pixel-space model on a backend, or on the reference executor."""

    def opened(backend: str) -> ServedModel:
        if backend == "ort":
            return ServedModel(engine, name=backend, slots=SLOTS)
        if backend == "reference":
            with pytest.MonkeyPatch.context() as patch:
                manifest = Manifest.read(engine, kind="engine")
                patch.setattr(
                    model_module, "load_denoiser", lambda *_, **__: EngineDenoiser(manifest, ReferenceSession(Reference(artifact_w4a4)))
                )
                return ServedModel(engine, name=backend, slots=SLOTS)
        pytest.importorskip(backend)
        path = tmp_path_factory.mktemp("served") / backend  # a new one each time
        build_engine(onnx_w4a4, path, backend=backend, options=BuildOptions(profile={"batch": ShapeRange(SLOTS, SLOTS, SLOTS)}))
        return ServedModel(path, name=backend, slots=SLOTS)

    return opened


@pytest.fixture
def replica_of() -> Iterator[Callable[..., Replica]]:
    """Makes replicas, which are closed at the end; their models stay open for other tests."""
    made: list[Replica] = []

    def make(served: ServedModel, *, pad: bool = True, **limits) -> Replica:
        made.append(Replica(served, Limits(**limits), pad=pad))
        return made[-1]

    yield make
    with pytest.MonkeyPatch.context() as patch:
        for replica in made:
            patch.setattr(replica.model, "close", lambda: None)
            replica.close()
