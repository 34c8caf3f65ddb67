"""The float model as an engine: exported and built like any artifact, but without quantized sites."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edm_deploy.artifact.artifact import JSON_NAME, Artifact
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.pipelines.source import float_artifact, load_source
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.storage.directories import INDEX_FILE
from edm_deploy_tools.common.build_options import build


def float_graph(manifest: Manifest, config: Mapping[str, Any], model: nn.Module, out: Path) -> None:
    """Export the float model: an ONNX directory without quantized sites, for the shapes of `config`."""
    artifact = Artifact(
        family=manifest.family,
        config=config,
        timesteps=torch.zeros(1, dtype=torch.int32),
        row_of_timestep=torch.zeros(manifest.num_train_timesteps, dtype=torch.int32),
        sites={},
        params={name: value.float() for name, value in model.state_dict().items()},
    )
    onnx_from_artifact(artifact, out)


def build_float_engine(onnx: Path, out: Path, *, backend: str, precision: str, threads: int | None, batch: int) -> None:
    """Build an engine from a directory of `float_graph`.

    Args:
        onnx: The directory written by `float_graph`.
        out: The directory of the engine.
        backend: `openvino` or `ort`.
        precision: `fp32` or `bf16`; ignored by ort, which uses that of the graph.
        threads: CPU threads; None is the backend's default.
        batch: The batch size of all calls.

    Raises:
        UnsupportedError: The backend is not installed.
    """
    options = BuildOptions(
        profile={"batch": ShapeRange(batch, batch, batch)}, threads=threads, precision=None if backend == "ort" else precision
    )
    build(onnx, out, backend=backend, options=options)


def artifact_or_float(path: Path) -> Artifact:
    """The artifact in `path`, or an artifact without quantized sites of the diffusers model in `path`, to measure the error of an engine alone.

    Raises:
        ArtifactError, UnsupportedError: As Artifact.load and load_source.
    """
    is_model = (path / INDEX_FILE).is_file() and not (path / JSON_NAME).is_file()
    return float_artifact(load_source(path)) if is_model else Artifact.load(path)
