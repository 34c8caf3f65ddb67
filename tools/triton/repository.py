"""Write a model repository: the denoiser for one of Triton's own backends, and a Python model that runs the whole pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edm_deploy.artifact.artifact import JSON_NAME, Artifact
from edm_deploy.errors import InputError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.manifest import NAME as MANIFEST
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.directories import read_json, write_json
from edm_deploy.storage.output_directory import DirectoryKind, check_output, new_directory
from edm_deploy_tools.triton import served_pipeline
from edm_deploy_tools.triton.model_config import denoiser_config, pipeline_config, provider_of
from engines import backend_named, build_engine
from engines.nvidia.tensorrt_backend import ENGINE_NAME as PLAN
from engines.openvino import save_graph

MARKER = "edm-deploy.json"  # Triton reads directories only
REPOSITORY = DirectoryKind("a Triton model repository", MARKER)
PIPELINE = "{}_pipeline"
GPU_BACKENDS = ("trt", "trt-rtx", "cuda")


@dataclass(frozen=True)
class Repository:
    """What was written.

    Attributes:
        denoiser: Name of the denoiser's model; None if the Python model alone can serve it.
        pipeline: Name of the model that runs the pipeline.
        reason: Why there is no denoiser; empty if there is one.
    """

    denoiser: str | None
    pipeline: str
    reason: str = ""


def write_repository(source: Path, out: Path, *, name: str, backend: str | None) -> Repository:
    """Write a repository to directory `out`, whole or not at all.

    Args:
        source: An artifact, an ONNX directory, or an engine.
        out: The repository: `NAME/config.pbtxt`, `NAME/1/model.*`, `NAME_pipeline/config.pbtxt`, `NAME_pipeline/1/model.py` with its engine.
        name: Of the denoiser's model.
        backend: Backend of the engine; None is that of `source` if that is an engine, else `ort`.

    Raises:
        InputError: `name` cannot be a directory, or `backend` is another than that of the engine.
        ArtifactError, UnsupportedError: As `onnx_from_artifact` and `build_engine`.
    """
    if not name or name.strip(".") == "" or not all(each.isalnum() or each in "._-" for each in name):
        raise InputError(f"--name {name!r}: expected letters, digits, '.', '_' and '-', as the name of a directory. Choose another name.")
    check_output(out, kind=REPOSITORY)
    with new_directory(out, kind=REPOSITORY) as directory:
        version = directory / PIPELINE.format(name) / "1"
        graph = _engine(source, version / "engine", directory / ".graph", backend)
        manifest = Manifest.read(version / "engine", kind="engine")
        shutil.copyfile(served_pipeline.__file__, version / "model.py")
        kind = "KIND_GPU" if manifest.backend in GPU_BACKENDS or provider_of(manifest) != "cpu" else "KIND_CPU"
        (version.parent / "config.pbtxt").write_text(pipeline_config(version.parent.name, manifest, kind=kind))
        reason = outside_the_graph(manifest) or _denoiser(manifest, version / "engine", graph, directory / name)
        shutil.rmtree(directory / ".graph", ignore_errors=True)
        models = [path.name for path in directory.iterdir()]
        write_json(directory / MARKER, {"artifact": manifest.artifact, "backend": manifest.backend, "files": dict.fromkeys(models, "")})
    return Repository(None if reason else name, PIPELINE.format(name), reason)


def outside_the_graph(manifest: Manifest) -> str:
    """What our runtime computes by timestep or for LoRAs outside the graph, so that the graph alone is not the denoiser; empty if nothing."""
    if manifest.correction:
        return "its corrections by timestep (pass tac) are applied outside the graph"
    if manifest.relaxed:
        return "it has two graphs, chosen by the timestep (pass pcr)"
    if manifest.adapters:
        return "the weights of LoRAs are further inputs of its graph"
    return ""


def _engine(source: Path, engine: Path, graph: Path, backend: str | None) -> Path | None:
    """Copy or build the engine; returns the ONNX directory that it was built from, None if there is none."""
    is_artifact, name = (source / JSON_NAME).is_file(), backend or "ort"
    if not is_artifact and read_json(source / MANIFEST, what="artifact, ONNX or engine").get("kind") == "engine":
        built = Manifest.read(source, kind="engine").backend
        if backend not in (None, built):
            raise InputError(f"--for {backend}: {source} is an engine of backend {built}. Leave --for out, or name the artifact.")
        shutil.copytree(source, engine)
        return None
    engine.parent.mkdir(parents=True)
    if is_artifact and backend_named(name).builds_from == "artifact":
        build_engine(source, engine, backend=name)
        return None
    if is_artifact:
        onnx_from_artifact(Artifact.load(source), graph)
    else:
        shutil.copytree(source, graph)
    build_engine(graph, engine, backend=name)
    return graph


def _denoiser(manifest: Manifest, engine: Path, graph: Path | None, model: Path) -> str:
    """Write the denoiser's model, if one of Triton's backends can execute it; else returns why not."""
    version = model / "1"

    def onnx() -> None:
        for name in manifest.files:
            if name.startswith(GRAPH_NAME):
                shutil.copyfile(engine / name, version / name)

    def ir() -> None:
        assert graph is not None
        save_graph(graph / GRAPH_NAME, version / "model.xml")

    writers: dict[str, tuple[str, Callable[[], object]]] = {
        "ort": ("onnxruntime", onnx),
        "trt": ("tensorrt", lambda: shutil.copyfile(engine / PLAN, version / "model.plan")),
        "openvino": ("openvino", ir),
    }
    if manifest.backend not in writers:
        return f"Triton has no backend for an engine of {manifest.backend}"
    if manifest.backend == "openvino" and graph is None:
        return "an openvino engine gets its scales as inputs; name the artifact with --for openvino in its place"
    name, write = writers[manifest.backend]
    version.mkdir(parents=True)
    write()
    (model / "config.pbtxt").write_text(denoiser_config(model.name, manifest, name))
    return ""
