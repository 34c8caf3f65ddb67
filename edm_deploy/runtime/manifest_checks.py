"""Checks of a manifest when it is read, so that a damaged or hostile one is refused before anything is built, opened or run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from edm_deploy.artifact.timestep_correction import latent_channels
from edm_deploy.errors import ArtifactError, EdmDeployError
from edm_deploy.models import family_named
from edm_deploy.network.family import ModelInput
from edm_deploy.runtime.capabilities import capabilities_of
from edm_deploy.storage.directories import check_regular, sha256_of
from edm_deploy.storage.json_schema import check_config, convert

Gpu = Annotated[str, Meta(pattern=r"^sm_\d{2,3}$")]


@dataclass(frozen=True, kw_only=True)
class BuiltOptions:
    """`build.options`: the options of `BuildOptions` that an engine's backend has, as they took effect."""

    gpu: Gpu | None = None
    precision: str | None = None
    optimization_level: Annotated[int, Meta(ge=0, le=5)] | None = None
    workspace_mib: Annotated[int, Meta(ge=1, le=2**24)] | None = None
    threads: Annotated[int, Meta(ge=0, le=1024)] | None = None
    provider: Literal["cpu", "cuda", "tensorrt"] | None = None
    cuda_graphs: bool | None = None


@dataclass(frozen=True, kw_only=True)
class BuildDescription:
    """`build` of an engine's manifest, as far as it is read again; a backend may state more.

    Attributes:
        versions: Of the packages that must be the same when it is opened, by name.
        options: See `BuiltOptions`.
        warnings: One line each.
        seconds: That the build took.
        engine_bytes: Size of the engine's files.
        layout: Of packed weights.
        gpus: That the engine was built for.
    """

    versions: Mapping[str, str]
    options: BuiltOptions
    warnings: tuple[str, ...] = ()
    seconds: Annotated[float, Meta(ge=0)] = 0.0
    engine_bytes: Annotated[int, Meta(ge=0)] = 0
    layout: int | None = None
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FoldedDescription:
    """`folded` of a manifest: the layers of the timestep alone, and what they became."""

    layers: tuple[str, ...]
    table: str | None = None
    computed: str | None = None


class _ReadKeys(dict[str, Any]):
    """A config that remembers which of its fields was read last: the one that does not fit when a family fails on it."""

    last = ""

    def __getitem__(self, key: str) -> Any:
        self.last = key
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.last = key
        return super().get(key, default)


def check_files(directory: Path, files: Mapping[str, str], *, listed_in: str) -> None:
    """Raises ArtifactError where a listed file is missing, outside the directory or not the one that was written.

    Args:
        directory: Of the files.
        files: sha256 by relative path.
        listed_in: The file that states them.
    """
    for name, expected in files.items():
        path = directory / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise ArtifactError(
                f"{directory / listed_in} lists {name!r}, which is outside its directory. Do not use it; make the directory again."
            )
        if not path.exists():
            raise ArtifactError(f"{path} is missing, but {listed_in} lists it. Copy the whole directory, or make it again.")
        check_regular(path, home=directory)
        if sha256_of(path) != expected:
            raise ArtifactError(f"{path} does not match {listed_in} (sha256 differs): it was changed or damaged. Make the directory again.")


def check_tensors(inputs: Sequence[ModelInput], outputs: Sequence[str]) -> None:
    """Raises ArtifactError where a graph's inputs or outputs are named twice, or an input's first dimension is not the batch."""
    names = [declared.name for declared in inputs]
    if len(set(names)) != len(names) or len(set(outputs)) != len(outputs):
        raise ArtifactError("inputs or outputs name one tensor twice.")
    for declared in inputs:
        if not declared.dims or declared.dims[0] != "batch":
            raise ArtifactError(f"inputs: {declared.name!r} has dims {list(declared.dims)}, expected 'batch' first.")
        for dim in declared.dims:
            if isinstance(dim, int) and not 1 <= dim < 2**31:
                raise ArtifactError(f"inputs: {declared.name!r} has dims {list(declared.dims)}, expected sizes of 1 to 2^31.")


def check_family(name: str, config: Mapping[str, Any]) -> int:
    """Check that a family can read a config.

    Returns:
        Channels of the model's latents.

    Raises:
        ArtifactError: A field is missing, or has a value that the model cannot have.
        UnsupportedError: No such family, or it does not support this config.
    """
    check_config(config)
    family, config = family_named(name), _ReadKeys(config)
    try:
        for read in (family.inputs, family.sizes, family.limits, family.size_multiple, family.guidance, family.classes, family.attributes):
            read(config)
        dims = [dim for declared in family.inputs(config) for dim in declared.dims]
        if any(isinstance(dim, bool) or (isinstance(dim, str) and not dim.isidentifier()) for dim in dims):
            raise TypeError(dims)
        channels = latent_channels(family.latent_shape(config))
    except EdmDeployError:
        raise
    except Exception as err:  # a family may fail in any way on a value that diffusers does not write
        if config.last not in config:
            raise ArtifactError(f"config has no field {config.last!r}, which {family.class_name} needs.") from err
        raise ArtifactError(f"config.{config.last} has a value that {family.class_name} cannot have.") from err
    return channels


def check_build(content: Mapping[str, Any], backend: str) -> None:
    """Check `build` of an engine's manifest, in particular what its backend reads when the engine is opened.

    Raises:
        ArtifactError: A field is missing, has another type or is out of bounds.
        UnsupportedError: No such backend.
    """
    capabilities = capabilities_of(backend)
    options = convert(content, BuildDescription, path="build").options
    for name in capabilities.recorded_options:
        if name not in content["options"]:
            raise ArtifactError(f"build.options has no field {name!r}, which {backend} reads.")
    if "gpu" in capabilities.recorded_options and options.gpu is None:
        raise ArtifactError("build.options.gpu is null, expected a compute capability such as 'sm_86'.")
    if "precision" in capabilities.recorded_options and options.precision not in capabilities.float_dtypes:
        raise ArtifactError(f"build.options.precision is {options.precision!r}, expected {' or '.join(capabilities.float_dtypes)}.")
