"""The JSON files of a diffusers directory: family, config and scheduler of a model, without its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.config_check import check_config, check_schedule
from edm_deploy.network.family import Config, Family
from edm_deploy.storage.directories import INDEX_FILE, PIPELINE_FILES, SCHEDULER_FILE, SOURCE_KEY, read_json

COMPONENTS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A pipeline's denoiser and scheduler, as its JSON files describe them.

    Attributes:
        name: Path, hub id or architecture, as the user specified it.
        family: Name of the denoiser's family.
        component: The denoiser's name in the pipeline.
        config: The denoiser's full config, without diffusers' private keys.
        scheduler_class: The diffusers class of the pipeline's scheduler.
        pipeline: The pipeline's JSON files, by relative path.
    """

    name: str
    family: str
    component: str
    config: Config
    scheduler_class: str
    pipeline: Mapping[str, Any]

    @property
    def family_object(self) -> Family:
        """The family that `family` names."""
        return family_named(self.family)

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Config of the pipeline's scheduler."""
        content: Mapping[str, Any] = self.pipeline[SCHEDULER_FILE]
        return content


def read_pipeline_config(directory: Path, name: str | None = None) -> PipelineConfig:
    """Read the config of a local diffusers directory from its JSON files, and check that the model can be quantized.

    Args:
        directory: Directory of the pipeline.
        name: Its name as the user specified it; None is the directory.

    Raises:
        ArtifactError: The directory holds no pipeline, or one without a scheduler.
        UnsupportedError: The pipeline has no denoiser, or no family supports its class or config.
    """
    name = name or str(directory)
    source = str(Path(name).resolve()) if Path(name).exists() else name  # from another working directory too
    index = read_json(directory / INDEX_FILE, what="diffusers pipeline")
    if "scheduler" not in index:
        raise ArtifactError(
            f"{name} is a pipeline without a scheduler; a trajectory needs one. Add {SCHEDULER_FILE} and its entry in {INDEX_FILE}."
        )
    component = next((component for component in COMPONENTS if component in index), None)
    if component is None:
        raise UnsupportedError(f"{name} is a {index.get('_class_name')} without a unet or transformer; there is no denoiser to quantize.")
    if index.get("requires_aesthetics_score"):
        raise UnsupportedError(
            f"{name} is an SDXL refiner: it denoises only samples that the base model has nearly finished, which trajectories from noise do "
            "not contain. Quantize the base model, and leave the refiner in floating point."
        )
    family = name_of_family(str(index[component][1]))
    config = read_json(directory / component / "config.json", what="diffusers model")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise UnsupportedError(f"{name} is quantized already ({method}); expected float weights. Use the model that it was quantized from.")
    files = {path: read_json(directory / path, what="diffusers pipeline") for path in PIPELINE_FILES}
    config = family_named(family).full_config(config)
    check_config(family_named(family), config)
    check_schedule(family_named(family), config, files[SCHEDULER_FILE])
    return PipelineConfig(
        name=name,
        family=family,
        component=component,
        config=config,
        scheduler_class=str(index["scheduler"][1]),
        pipeline=files | {INDEX_FILE: index | {SOURCE_KEY: source}},
    )
