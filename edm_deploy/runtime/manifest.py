"""The manifest of an ONNX graph or an engine: its artifact, inputs, sites and files. Checked before anything is deserialized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from msgspec import Meta

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import Op
from edm_deploy.artifact.timestep_correction import Correction
from edm_deploy.artifact.timestep_routing import Intervals, check_intervals, intervals_from_mask, mask_from_intervals
from edm_deploy.errors import ArtifactError, EdmDeployError, InputError
from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.network.family import ModelInput
from edm_deploy.network.graph_names import GRAPH_NAME, OUTPUT
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.numerics.kernel_layout import CodeFormat
from edm_deploy.runtime.capabilities import SitePlan
from edm_deploy.runtime.manifest_checks import FoldedDescription, check_build, check_family, check_files, check_tensors
from edm_deploy.storage.directories import PIPELINE_NAMES, read_json, read_pipeline_files, sha256_of, write_json
from edm_deploy.storage.json_schema import Scheme, Sha256, Timesteps, check_schema, convert
from edm_deploy.storage.output_directory import DirectoryKind

SCHEMA = 3  # 2 added `structure`, `correction` and `relaxed`; 3 added `adapters`
NAME = "manifest.json"
ONNX = DirectoryKind("an ONNX directory", NAME, PIPELINE_NAMES, kind="onnx")
ENGINE = DirectoryKind("an engine", NAME, PIPELINE_NAMES, kind="engine")
GraphDtype = Literal["fp32", "fp16"]
TORCH_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


MAX_SIZE = 2**16  # of a profile: batches below the smallest size are padded to it in memory
ProfileSize = Annotated[int, Meta(le=MAX_SIZE)]


@dataclass(frozen=True)
class ShapeRange:
    """Sizes of one dynamic dimension: smallest, the one to optimise for, largest."""

    min: ProfileSize
    opt: ProfileSize
    max: ProfileSize

    def __post_init__(self) -> None:
        if not 1 <= self.min <= self.opt <= self.max:
            raise InputError(f"shape profile {self.min}:{self.opt}:{self.max}: expected 1 <= MIN <= OPT <= MAX.")


@dataclass(frozen=True)
class GraphSite:
    """One quantized layer in a graph.

    Attributes:
        node: Name of its Conv or MatMul node, as used in layer tables and profiles.
        op: Its op in the model.
        scheme: Its bits, `W4A4`.
        plugin: Code format of the plugin node that computes it; None for Q/DQ nodes, which any backend reads.
    """

    node: str
    op: Op
    scheme: Scheme
    plugin: CodeFormat | None = None

    @property
    def quantized_input(self) -> bool:
        """Whether its input is quantized in addition to its weight."""
        return not self.scheme.endswith(f"A{WEIGHT_ONLY_BITS}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of an ONNX graph (`onnx`) or an engine (`engine`).

    Attributes:
        kind: `onnx` or `engine`.
        artifact: Digest of the artifact.
        scheme: Bits of the majority of sites, `W4A4`.
        family, config: The denoiser.
        num_train_timesteps: Exclusive upper bound of timesteps.
        dtype: Floating-point type of the graph's sample input.
        weight_storage: `int8` or `int4`.
        inputs, outputs: Of the denoiser, in order. The graph's other inputs are those of `adapters`.
        sites: Each quantized layer, by its name in the model.
        structure: Equivalent rewrites of the published network, as written by `NetworkRewrite.to_json`.
        folded: `layers` that depend on the timestep alone, with either their `table` or the reason why they are `computed`; empty where there are none.
        correction: Correction of sample and prediction, as written by `Correction.to_json`; empty where there is none.
        relaxed: Intervals of timesteps that the second graph or engine in the folder `relaxed` computes; empty where there is none.
        adapters: Branches for LoRA weights, whose inputs follow `inputs` in the graph; None where it has none.
        files: sha256 by relative path.
        plan: Planned execution of each site of an engine; empty for a graph.
        backend: Name of an engine's backend.
        profile: Sizes of an engine by dynamic dimension.
        build: Versions, GPU, options and build time of an engine.
    """

    kind: Literal["onnx", "engine"]
    artifact: Sha256
    scheme: Scheme
    family: str
    config: Mapping[str, Any]
    num_train_timesteps: Timesteps
    dtype: GraphDtype
    weight_storage: Literal["int8", "int4"]
    inputs: Annotated[tuple[ModelInput, ...], Meta(min_length=1)]
    outputs: Annotated[tuple[str, ...], Meta(min_length=1)]
    sites: Mapping[str, GraphSite]
    structure: Mapping[str, Any] = field(default_factory=dict)
    folded: Mapping[str, Any] = field(default_factory=dict)
    correction: Mapping[str, Any] = field(default_factory=dict)
    relaxed: Intervals = ()
    adapters: AdapterInputs | None = None
    files: Annotated[Mapping[str, Sha256], Meta(min_length=1)] = field(default_factory=dict)
    plan: Mapping[str, SitePlan] = field(default_factory=dict)
    backend: str | None = None
    profile: Mapping[str, ShapeRange] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Floating-point type of the graph's sample input."""
        return TORCH_DTYPES[self.dtype]

    @property
    def graph_inputs(self) -> tuple[ModelInput, ...]:
        """Every input of the graph in order: those of the denoiser, then those of its adapter branches."""
        return self.inputs + (self.adapters.inputs if self.adapters else ())

    @property
    def dynamic_dims(self) -> tuple[str, ...]:
        """Names of the dynamic dimensions, in order of appearance."""
        return tuple(dict.fromkeys(dim for declared in self.inputs for dim in declared.dims if isinstance(dim, str)))

    @property
    def plugin_sites(self) -> dict[str, CodeFormat]:
        """Code formats of the sites that plugin nodes compute. Only TensorRT runs a graph that has any."""
        return {name: site.plugin for name, site in self.sites.items() if site.plugin is not None}

    @property
    def engine_of_timestep(self) -> torch.Tensor | None:
        """uint8 [num_train_timesteps], 1 for timesteps of the second graph or engine; None where there is none."""
        return mask_from_intervals(self.relaxed, self.num_train_timesteps) if self.relaxed else None

    @classmethod
    def of(
        cls,
        artifact: Artifact,
        nodes: Mapping[str, str],
        *,
        kind: Literal["onnx", "engine"],
        dtype: GraphDtype,
        weight_storage: Literal["int8", "int4"],
        plugins: Mapping[str, CodeFormat] | None = None,
    ) -> Manifest:
        """The manifest of a graph or an engine that is made from `artifact`; files are hashed when it is written.

        Args:
            artifact: A valid artifact.
            nodes: Name of each site's node in the graph.
            kind: `onnx` or `engine`.
            dtype: Floating-point type of the sample input.
            weight_storage: `int8` or `int4`.
            plugins: Code formats of the sites that plugin nodes compute.
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
        content = read_json(directory / NAME, what=kind, home=directory, finite=True)
        check_schema(content.pop("schema", None), SCHEMA, directory / NAME)
        if (actual := content.get("kind")) != kind:
            remedy = "Run edm-deploy build-engine on it first." if kind == "engine" else "Pass the directory that edm-deploy export wrote."
            shown = f"an {actual}" if actual in ("onnx", "engine") else "something else"
            raise ArtifactError(f"{directory} holds {shown}, expected an {kind} directory. {remedy}")
        try:
            manifest = convert(content, cls, forbid_unknown=True)
            manifest._check()
        except EdmDeployError as err:
            raise ArtifactError(f"{directory / NAME} is not a manifest that edm-deploy wrote: {err} Make the directory again.") from err
        check_files(directory, manifest.files, listed_in=NAME)
        read_pipeline_files(directory)
        return manifest

    def require_files(self, *names: str) -> None:
        """Raises ArtifactError where one of `names` is not among `files`: a file without a hash is not opened."""
        if missing := [name for name in names if name not in self.files]:
            raise ArtifactError(
                f"{NAME} does not list {missing[0]!r} among its files, which {self.backend or 'a graph'} has. Make it again."
            )

    def _check(self) -> None:
        """Raises ArtifactError or UnsupportedError, naming the field, where the content is not what an export or a build writes."""
        check_tensors(self.inputs, self.outputs)
        channels = check_family(self.family, self.config)
        check_intervals(self.relaxed, self.num_train_timesteps)
        NetworkRewrite.from_json(self.structure)
        if self.correction:
            problem = Correction.from_json(self.correction).problem(self.num_train_timesteps, channels)
            if problem:
                raise ArtifactError(f"correction: {problem}.")
        for name, shape in self.adapters.layers.items() if self.adapters else ():
            if name not in self.sites or len(shape) not in (2, 4):
                raise ArtifactError(f"adapters.layers has {name!r} with shape {list(shape)}, expected a site with two or four sizes.")
        if self.folded:
            convert(self.folded, FoldedDescription, path="folded")
        if self.kind == "onnx":
            self.require_files(GRAPH_NAME)
            return
        if self.backend is None:
            raise ArtifactError("backend is null, expected the name of a backend.")
        check_build(self.build, self.backend)
        if set(self.plan) != set(self.sites):
            raise ArtifactError(f"plan and sites differ in {min(set(self.plan) ^ set(self.sites))!r}, expected the same layers in both.")
        if set(self.profile) != set(self.dynamic_dims):
            raise ArtifactError(f"profile has {sorted(self.profile)}, expected the dynamic dimensions {sorted(self.dynamic_dims)}.")
