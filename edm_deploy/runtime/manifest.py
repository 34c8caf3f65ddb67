"""The manifest beside an ONNX graph or an engine: what it was made from, what it takes, what it became. Checked before anything is deserialized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import Op
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import Intervals, intervals_from_mask, mask_from_intervals
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.network.family import ModelInput
from edm_deploy.network.graph_names import OUTPUT
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.capabilities import SitePlan
from edm_deploy.storage.directories import read_json, sha256_of, write_json

SCHEMA = 2  # 2 brought `structure`, `correction` and `relaxed`
NAME = "manifest.json"
GraphDtype = Literal["fp32", "fp16"]
TORCH_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class ShapeRange:
    """Sizes that one dynamic dimension may take: smallest, the one to optimise for, largest."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"shape profile {self.min}:{self.opt}:{self.max}: expected 1 <= MIN <= OPT <= MAX.")


@dataclass(frozen=True)
class GraphSite:
    """One quantized layer as it stands in a graph.

    Attributes:
        node: Name of its Conv or MatMul node, by which layer tables and profiles speak of it.
        op: What it was in the model.
        scheme: Its bits, `W4A4`.
        plugin: How plugin nodes pack its codes, where they compute it; None where it is Q/DQ, which any backend reads.
    """

    node: str
    op: Op
    scheme: str
    plugin: CodeFormat | None = None

    @property
    def quantized_input(self) -> bool:
        """Whether its input is quantized, not only its weight."""
        return not self.scheme.endswith(f"A{WEIGHT_ONLY_BITS}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What stands beside an ONNX graph (`onnx`) or an engine (`engine`).

    Attributes:
        kind: Which of the two.
        artifact: Digest of the artifact.
        scheme: Bits of most sites, `W4A4`.
        family, config: The denoiser.
        num_train_timesteps: Timesteps lie in [0, this).
        dtype: Floating-point type of the graph's sample input.
        weight_storage: `int8` or `int4`.
        inputs, outputs: Of the graph, in order.
        sites: Each quantized layer, by its name in the model.
        structure: What the network computes otherwise than the published one, as `Structure.to_json` writes it.
        folded: `layers` that see the timestep alone, and either the `table` that they became or why they are `computed`; empty where none are.
        correction: What the runtime does to sample and prediction, as `Correction.to_json` writes it; empty where it does nothing.
        relaxed: Stretches of timesteps that the second graph or engine computes, which stands in the folder `relaxed`; empty where there is none.
        files: sha256 by relative path.
        plan: What each site becomes; empty for a graph, which is for any backend.
        backend: Name, for an engine.
        profile: Sizes by dynamic dimension, for an engine.
        build: Versions, GPU, options and build time of an engine, in its backend's words.
    """

    kind: Literal["onnx", "engine"]
    artifact: str
    scheme: str
    family: str
    config: Mapping[str, Any]
    num_train_timesteps: int
    dtype: GraphDtype
    weight_storage: str
    inputs: tuple[ModelInput, ...]
    outputs: tuple[str, ...]
    sites: Mapping[str, GraphSite]
    structure: Mapping[str, Any] = field(default_factory=dict)
    folded: Mapping[str, Any] = field(default_factory=dict)
    correction: Mapping[str, Any] = field(default_factory=dict)
    relaxed: Intervals = ()
    files: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, SitePlan] = field(default_factory=dict)
    backend: str | None = None
    profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Floating-point type of the graph's sample input."""
        return TORCH_DTYPES[self.dtype]

    @property
    def dynamic_dims(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order of appearance."""
        return tuple(dict.fromkeys(dim for declared in self.inputs for dim in declared.dims if isinstance(dim, str)))

    @property
    def plugin_sites(self) -> dict[str, CodeFormat]:
        """The sites that plugin nodes compute, and how they pack codes. A graph that has any is for TensorRT alone."""
        return {name: site.plugin for name, site in self.sites.items() if site.plugin is not None}

    @property
    def engine_of_timestep(self) -> torch.Tensor | None:
        """uint8 [num_train_timesteps], 1 where the second graph or engine computes; None where there is none."""
        return mask_from_intervals(self.relaxed, self.num_train_timesteps) if self.relaxed else None

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        nodes: Mapping[str, str],
        *,
        kind: Literal["onnx", "engine"],
        dtype: GraphDtype,
        weight_storage: str,
        plugins: Mapping[str, CodeFormat] | None = None,
    ) -> Manifest:
        """What is written beside what is made of `artifact`; its files are hashed when it is written.

        Args:
            artifact: A valid artifact.
            nodes: For each site the name by which the graph speaks of it.
            kind: What is made.
            dtype: Floating-point type of the sample that goes in.
            weight_storage: `int8` or `int4`.
            plugins: Sites that plugin nodes compute, and how they pack codes.
        """
        plugins = plugins or {}
        return cls(
            kind=kind,
            artifact=artifact.digest,
            scheme=artifact.scheme,
            family=artifact.family,
            config=dict(artifact.config),
            num_train_timesteps=artifact.num_train_timesteps,
            dtype=dtype,
            weight_storage=weight_storage,
            inputs=artifact.family_object.inputs(artifact.config),
            outputs=(OUTPUT,),
            sites={name: GraphSite(nodes[name], site.op, site.scheme, plugins.get(name)) for name, site in artifact.sites.items()},
            structure=artifact.structure.to_json(),
            correction=artifact.correction.to_json() if artifact.correction else {},
            relaxed=() if artifact.relaxed is None else intervals_from_mask(artifact.relaxed),
        )

    def write(self, directory: Path, files: list[str]) -> Manifest:
        """Write `manifest.json` into `directory`, with the hashes of `files`; returns the manifest with them."""
        complete = replace(self, files={name: sha256_of(directory / name) for name in sorted(files)})
        write_json(directory / NAME, {"schema": SCHEMA} | asdict(complete))
        return complete

    @classmethod
    def read(cls, directory: Path | str, *, kind: Literal["onnx", "engine"]) -> Manifest:
        """Read a manifest and check every file that it lists.

        Raises:
            ArtifactError: No manifest, one of the other kind or of a newer schema, or a file that is missing or not the one that was written.
        """
        directory = Path(directory)
        content = read_json(directory / NAME, what=kind)
        schema = content.pop("schema", None)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ArtifactError(
                f"{directory / NAME} has schema {schema!r}; this edm-deploy reads up to {SCHEMA}. Install a newer edm-deploy, or make it again."
            )
        if content.get("kind") != kind:
            mend = "Run edm-deploy build-engine on it first." if kind == "engine" else "Pass the directory that edm-deploy export wrote."
            raise ArtifactError(f"{directory} holds an {content.get('kind')}, expected an {kind} directory. {mend}")
        try:
            manifest = cls(
                **content
                | {
                    "inputs": tuple(ModelInput(entry["name"], entry["kind"], tuple(entry["dims"])) for entry in content["inputs"]),
                    "outputs": tuple(content["outputs"]),
                    "sites": {site: GraphSite(**entry) for site, entry in content["sites"].items()},
                    "plan": {site: SitePlan(**entry) for site, entry in content["plan"].items()},
                    "profile": {dim: ShapeRange(**entry) for dim, entry in content["profile"].items()},
                    "relaxed": tuple((int(first), int(last)) for first, last in content.get("relaxed", ())),
                }
            )
            manifest._check_by_timestep()
        except (KeyError, TypeError, AttributeError, ValueError) as err:
            raise ArtifactError(f"{directory / NAME} is not a manifest that edm-deploy wrote ({err!r}). Make the directory again.") from err
        if not all(isinstance(name, str) and isinstance(digest, str) for name, digest in dict(content["files"] or {"": None}).items()):
            raise ArtifactError(f"{directory / NAME} lists no files with their hashes. Make the directory again.")
        manifest._check_files(directory)
        return manifest

    def _check_by_timestep(self) -> None:
        """Raises ValueError and its like where what the runtime does by timestep is not what `of` wrote."""
        _ = self.engine_of_timestep
        NetworkRewrite.from_json(self.structure)
        if self.correction:
            Correction.from_json(self.correction)

    def _check_files(self, directory: Path) -> None:
        for name, expected in self.files.items():
            path = directory / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise ArtifactError(
                    f"{directory / NAME} lists {name!r}, which lies outside its directory. Do not use it; make the directory again."
                )
            if not path.is_file():
                raise ArtifactError(f"{path} is missing, but {NAME} lists it. Copy the whole directory, or make it again.")
            if sha256_of(path) != expected:
                raise ArtifactError(f"{path} does not match {NAME} (sha256 differs): it was changed or damaged. Make the directory again.")
