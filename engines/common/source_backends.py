"""Base classes of backends that build from an exported graph and of those that build from the artifact."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from edm_deploy.artifact import artifact as artifact_module
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.relaxed_timesteps import FOLDER, quantized_graph, relaxed_graph
from edm_deploy.errors import ArtifactError
from edm_deploy.network.family import TIMESTEP
from edm_deploy.network.graph_names import GRAPH_NAME
from edm_deploy.runtime.backend import Backend, BuildOptions, SiteTestCase
from edm_deploy.runtime.capabilities import check_plugins, check_storage
from edm_deploy.runtime.load import open_session
from edm_deploy.runtime.manifest import NAME, Manifest, ShapeRange
from edm_deploy.storage.directories import read_json


class GraphBackend(Backend[Path]):
    """A backend that builds from an ONNX directory; `read` returns the path of the graph."""

    builds_from: ClassVar[Literal["onnx", "artifact"]] = "onnx"

    def read(self, source: Path) -> tuple[Path, Manifest]:
        if (source / artifact_module.JSON_NAME).is_file():
            raise ArtifactError(
                f"{source} is an artifact, and {self.name} builds from an ONNX directory. "
                f"Run edm-deploy export {source} --out {source}-onnx, then build from {source}-onnx."
            )
        manifest = Manifest.read(source, kind="onnx")
        manifest.require_files(*graph_files(source))
        check_storage(self.target, manifest.weight_storage)
        check_plugins(self.target, len(manifest.plugin_sites))
        return source / GRAPH_NAME, manifest

    def relaxed(self, source: Path, content: Path) -> tuple[Path, Manifest]:
        return self.read(source / FOLDER)

    def at_sites(self, cut: SiteTestCase, engine: Manifest, device: torch.device) -> dict[str, Tensor]:
        """Export the graph cut at every site, build it with the options of `engine`, and run it."""
        from edm_deploy.export.per_site import onnx_cut_at_sites  # onnx is needed for evaluation, not for deployment
        from engines import build_engine

        onnx, batch = cut.scratch / f"onnx-{engine.dtype}", len(cut.timestep)
        if not onnx.is_dir():
            onnx_cut_at_sites(quantized_graph(cut.artifact), cut.records, onnx, dtype=engine.dtype, adapters=cut.adapters)
        options = dataclasses.replace(options_of(engine), profile={"batch": ShapeRange(batch, batch, batch)})
        built = build_engine(onnx, cut.scratch / self.name, backend=self.name, options=options)
        values = {TIMESTEP.name: cut.timestep} | {f"{name}.x": record.x for name, record in cut.records.items()}
        inputs = {declared.name: values[declared.name].to(device).contiguous() for declared in built.inputs}
        for declared in built.adapters.inputs if built.adapters else ():
            inputs[declared.name] = cut.adapter_values[declared.name].to(device, built.torch_dtype).contiguous()
        with open_session(cut.scratch / self.name, device=device)[1] as session:
            return session.run(inputs)


class ArtifactBackend(Backend[Artifact]):
    """A backend that builds from the artifact."""

    builds_from: ClassVar[Literal["onnx", "artifact"]] = "artifact"

    def read(self, source: Path) -> tuple[Artifact, Manifest]:
        if (source / NAME).is_file():
            made_from = str(read_json(source / NAME, what="ONNX").get("artifact"))[:12]
            raise ArtifactError(
                f"{source} was made from an artifact, and {self.name} builds from the artifact itself. "
                f"Pass the directory that calibrate or finetune wrote (digest {made_from}): "
                f"edm-deploy build-engine ARTIFACT --out ENGINE --backend {self.name}."
            )
        return self._described(Artifact.load(source))

    def relaxed(self, source: Path, content: Artifact) -> tuple[Artifact, Manifest]:
        return self._described(relaxed_graph(content))

    def _described(self, artifact: Artifact) -> tuple[Artifact, Manifest]:
        return artifact, Manifest.of(artifact, {name: name for name in artifact.sites}, kind="engine", dtype="fp32", weight_storage="int4")


def graph_files(directory: Path) -> list[str]:
    """The graph's file in a directory, and those of its weights where they are separate."""
    return [GRAPH_NAME, *sorted(path.name for path in directory.glob(f"{GRAPH_NAME}.*"))]


def options_of(engine: Manifest) -> BuildOptions:
    """The options that an engine was built with, without its profile."""
    known = {field.name for field in dataclasses.fields(BuildOptions)}
    return BuildOptions(**{name: value for name, value in engine.build.get("options", {}).items() if name in known})
