"""The artifact: a quantized denoiser as one directory of json and safetensors, from which every engine is built."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm_deploy.artifact.disk_format import (
    ArtifactDescription,
    TensorReader,
    layer_from_tensors,
    tensor_from_param,
    tensors_from_layer,
)
from edm_deploy.artifact.quantized_layer import RELAXED_BITS, QuantizedLayer
from edm_deploy.artifact.timestep_correction import Correction, latent_channels
from edm_deploy.errors import ArtifactError, EdmDeployError
from edm_deploy.models import family_named
from edm_deploy.network.family import Family
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import PRE_SCALE, PUBLISHED, NetworkRewrite
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.storage.directories import PIPELINE_NAMES, copy_pipeline_files, read_json, read_pipeline_files, write_json
from edm_deploy.storage.json_schema import MAX_TIMESTEPS, check_config, check_schema, convert
from edm_deploy.storage.output_directory import DirectoryKind, new_directory
from edm_deploy.storage.tensor_file import DeferredTensor, check_params, digest_of, read_tensors, write_tensors

# 2 added `folded`; 3 added `structure`, `channel_bits`, `correction` and `relaxed`; 4 added `structure.branches`, `structure.rotated`, the sites' tables
# at relaxed timesteps, and `absorbed`.
SCHEMA = 4
JSON_NAME = "artifact.json"
TENSORS_NAME = "artifact.safetensors"
ABSORBED = "absorbed."
ARTIFACT = DirectoryKind("an artifact", JSON_NAME, (TENSORS_NAME, *PIPELINE_NAMES))


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A quantized denoiser. `validate` checks its invariants; `load` and `save` call it.

    Attributes:
        family: Name of the model family.
        config: The diffusers config of the denoiser.
        timesteps: int32 [R], ascending: the calibrated timestep of each table row.
        row_of_timestep: int32 [num_train_timesteps], the table row of each timestep.
        sites: Quantized layers by name.
        structure: Equivalent rewrites of the published network.
        folded: Layers that depend on the timestep alone and are not quantized: exporters replace their output by a table.
        correction: Correction of sample and prediction by the runtime; None where there is none.
        relaxed: uint8 [num_train_timesteps]: 1 where a second graph of the same weights computes, with inputs of `relaxed_bits` bits; None for no timestep.
        absorbed: Pre-scales that were folded into other layers, for adapters of the published network: `<site>.input` float32 [Cin], by which the input
            of a site is multiplied already, and `<site>.output` float32 [Cout], by which its output is.
        params: float32, every parameter and buffer that is not a quantized weight, by name in the model.
        provenance: Recipe, settings, seed, versions, teacher hash, wall time, peak memory. Not part of the digest.
        pipeline: The source pipeline's json files by relative path, from which a pipeline is rebuilt.
    """

    family: str
    config: Mapping[str, Any]
    timesteps: Tensor
    row_of_timestep: Tensor
    sites: Mapping[str, QuantizedLayer]
    params: Mapping[str, Tensor]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    structure: NetworkRewrite = PUBLISHED
    folded: tuple[str, ...] = ()
    correction: Correction | None = None
    relaxed: Tensor | None = None
    absorbed: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def family_object(self) -> Family:
        """The family that `family` names."""
        return family_named(self.family)

    def skeleton(self) -> torch.nn.Module:
        """The restructured float network on the meta device."""
        return meta_model(self.family_object, self.config, self.structure)

    @property
    def num_train_timesteps(self) -> int:
        """Length of the training schedule."""
        return len(self.row_of_timestep)

    @property
    def scheme(self) -> str:
        """Bits of the majority of sites, `W4A4`; `float` where there are no sites."""
        schemes = [site.scheme for site in self.sites.values()]
        return max(sorted(set(schemes)), key=schemes.count, default="float")

    @property
    def relaxed_bits(self) -> int | None:
        """Bits of the inputs at relaxed timesteps: 8 where sites have tables for them, else 16 for floating point; None without such timesteps."""
        if self.relaxed is None:
            return None
        return RELAXED_BITS if any(site.relaxed_activation is not None for site in self.sites.values()) else WEIGHT_ONLY_BITS

    @cached_property
    def digest(self) -> str:
        """sha256 hex of everything that determines what an engine computes: family, config, sites and tensors, but not the provenance."""
        return self._digest(digest_of(self._tensors()))

    def _digest(self, tensors_sha256: str) -> str:
        content = self._description() | {"tensors": tensors_sha256}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def validate(self) -> None:
        """Raises ArtifactError, naming the site, where an invariant does not hold."""
        for name, column in (("timesteps", self.timesteps), ("row_of_timestep", self.row_of_timestep), ("relaxed", self.relaxed)):
            if column is not None and (column.ndim != 1 or not 1 <= len(column) <= MAX_TIMESTEPS):
                raise ArtifactError(f"Artifact's {name} has shape {list(column.shape)}, expected 1 to {MAX_TIMESTEPS} numbers.")
        rows = len(self.timesteps)
        if bool((self.timesteps.diff() <= 0).any()):
            raise ArtifactError("Artifact's timesteps are not ascending; expected at least one, each once.")
        if int(self.row_of_timestep.min()) < 0 or int(self.row_of_timestep.max()) >= rows:
            raise ArtifactError(f"Artifact's row_of_timestep points outside its {rows} table rows.")
        if problem := self._problem_by_timestep():
            raise ArtifactError(f"Artifact's {problem}. Make the artifact again.")
        model = self.skeleton()
        layers = self.family_object.sites(model)
        if unknown := sorted(set(self.sites) - set(layers)):
            raise ArtifactError(f"Artifact has site {unknown[0]!r}, which the {self.family} model of its config does not have.")
        for name in self.folded:
            if name not in layers or name in self.sites:
                raise ArtifactError(
                    f"Artifact folds {name!r}, which is {'a quantized site' if name in layers else 'no layer'}. Make it again."
                )
        for name, site in self.sites.items():
            expected_op = "conv2d" if isinstance(layers[name], torch.nn.Conv2d) else "linear"
            problem = f"op is {site.op}, the layer is {expected_op}" if site.op != expected_op else None
            problem = problem or site.problem(tuple(layers[name].weight.shape), rows)
            if problem:
                raise ArtifactError(f"Site {name!r}: {problem}. Make the artifact again.")
        expected = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in self.sites}
        check_params(self.params, {key: tuple(value.shape) for key, value in expected.items()})
        for name, factor in self.absorbed.items():
            layer, _, side = name.rpartition(".")
            axis = {"input": 1, "output": 0}.get(side)
            if layer not in self.sites or axis is None or tuple(factor.shape) != (layers[layer].weight.shape[axis],):
                raise ArtifactError(f"Artifact's absorbed {name!r} {list(factor.shape)} fits no site. Make the artifact again.")
            if not bool((factor.isfinite() & (factor > 0)).all()):
                raise ArtifactError(f"Artifact's absorbed {name!r} holds a value that is not positive. Make the artifact again.")
        for name in self.structure.pre_scaled:
            if not bool((self.params[f"{name}.{PRE_SCALE}"] > 0).all()):
                raise ArtifactError(f"Layer {name!r}: pre_scale holds a value that is not positive. Make the artifact again.")

    def _problem_by_timestep(self) -> str | None:
        """What is invalid in `relaxed` or `correction`, as a phrase, or None."""
        if self.relaxed is not None and (len(self.relaxed) != self.num_train_timesteps or not 0 < int(self.relaxed.max()) < 2):
            return (
                f"relaxed has {len(self.relaxed)} numbers up to {int(self.relaxed.max())}, expected {self.num_train_timesteps} of 0 and 1"
            )
        if problem := self._problem_of_relaxed_tables():
            return problem
        if self.correction is None:
            return None
        channels = latent_channels(self.family_object.latent_shape(self.config))
        problem = self.correction.problem(self.num_train_timesteps, channels)
        return f"correction: {problem}" if problem else None

    def _problem_of_relaxed_tables(self) -> str | None:
        have = {name for name, site in self.sites.items() if site.relaxed_activation is not None}
        if have and self.relaxed is None:
            return f"site {min(have)!r} has a table for relaxed timesteps, and the artifact has no such timesteps"
        narrow = {name for name, site in self.sites.items() if site.activation is not None and site.activation.bits < RELAXED_BITS}
        if have and narrow - have:
            return f"site {min(narrow - have)!r} has no table for relaxed timesteps, and site {min(have)!r} has one"
        return None

    def save(self, path: Path | str, *, overwrite: bool = True) -> Path:
        """Write the artifact to directory `path`, completely or not at all; an existing artifact is replaced at the end.

        Raises:
            ArtifactError: The artifact is not valid, `path` holds something else, or writing fails.
        """
        self.validate()
        with new_directory(Path(path), kind=ARTIFACT, overwrite=overwrite) as directory:
            found = write_tensors(directory / TENSORS_NAME, self._tensors())
            description = {"schema": SCHEMA} | self._description()
            description |= {"tensors_sha256": found, "digest": self._digest(found), "provenance": dict(self.provenance)}
            write_json(directory / JSON_NAME, description)
            copy_pipeline_files(self.pipeline, directory)
        return Path(path)

    @classmethod
    def load(cls, path: Path | str) -> Artifact:
        """Read and validate an artifact; no code is executed, and an invalid artifact is never loaded in part.

        Raises:
            ArtifactError: `path` is not an artifact, was made by a newer version, or is damaged; the message names the remedy.
        """
        directory = Path(path)
        content = read_json(directory / JSON_NAME, what="artifact", home=directory, finite=True)
        check_schema(content.pop("schema", None), SCHEMA, directory / JSON_NAME)
        try:
            description = convert(content, ArtifactDescription)
            check_config(description.config)
        except ArtifactError as err:
            raise ArtifactError(f"{directory / JSON_NAME} does not describe an artifact: {err} Make the artifact again.") from err
        tensors = read_tensors(directory / TENSORS_NAME, description.tensors_sha256, listed_in=JSON_NAME)
        try:
            artifact = _artifact_from_parts(description, tensors, read_pipeline_files(directory))
            if (actual := artifact._digest(description.tensors_sha256)) != description.digest:
                raise ArtifactError(
                    f"{JSON_NAME} was changed or damaged: its digest is {description.digest[:12]}, its content has {actual[:12]}. "
                    "Copy or make the artifact again."
                )
            artifact.validate()
        except EdmDeployError as err:
            raise ArtifactError(f"{directory}: {err}") from err
        return artifact

    def _description(self) -> dict[str, Any]:
        sites = {
            name: {
                "op": site.op,
                "weight_shape": list(site.codes.shape),
                "weight_bits": site.weight_bits,
                "act_bits": site.activation.bits if site.activation else None,
            }
            for name, site in self.sites.items()
        }
        # Only where present, so that artifacts of earlier schemas keep their digests.
        optional = {"folded": list(self.folded), "structure": self.structure.to_json()}
        return {"family": self.family, "config": dict(self.config), "sites": sites} | {
            key: value for key, value in optional.items() if value
        }

    def _tensors(self) -> dict[str, DeferredTensor]:
        """Contents of artifact.safetensors; codes are packed and parameters narrowed one at a time, when they are written."""
        tensors = {"timesteps": DeferredTensor.of(self.timesteps), "row_of_timestep": DeferredTensor.of(self.row_of_timestep)}
        for name, site in self.sites.items():
            tensors |= tensors_from_layer(name, site)
        if self.correction is not None:
            tensors |= {f"correction.{name}": DeferredTensor.of(value) for name, value in vars(self.correction).items()}
        if self.relaxed is not None:
            tensors["relaxed"] = DeferredTensor.of(self.relaxed)
        tensors |= {f"{ABSORBED}{name}": DeferredTensor.of(value) for name, value in self.absorbed.items()}
        return tensors | {f"params.{name}": tensor_from_param(value) for name, value in self.params.items()}


def _artifact_from_parts(description: ArtifactDescription, tensors: Mapping[str, Tensor], pipeline: Mapping[str, Any]) -> Artifact:
    reader = TensorReader(tensors)
    correction = None
    if "correction.scale" in tensors:
        correction = Correction(
            row_of_timestep=reader.take("correction.row_of_timestep", torch.int32),
            scale=reader.take("correction.scale", torch.float32),
            input_bias=reader.take("correction.input_bias", torch.float32),
        )
    params = [name for name in tensors if name.startswith("params.")]
    absorbed = [name for name in tensors if name.startswith(ABSORBED)]
    artifact = Artifact(
        family=description.family,
        config=description.config,
        timesteps=reader.take("timesteps", torch.int32),
        row_of_timestep=reader.take("row_of_timestep", torch.int32),
        sites={name: layer_from_tensors(name, entry, reader) for name, entry in description.sites.items()},
        params={name.removeprefix("params."): reader.take(name, torch.float32, torch.float16).float() for name in params},
        structure=description.structure,
        folded=description.folded,
        correction=correction,
        relaxed=reader.take_if_present("relaxed", torch.uint8),
        absorbed={name.removeprefix(ABSORBED): reader.take(name, torch.float32) for name in absorbed},
        provenance=description.provenance,
        pipeline=pipeline,
    )
    reader.check_all_taken()
    return artifact
