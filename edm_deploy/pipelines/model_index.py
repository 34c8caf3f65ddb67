"""A diffusers directory without its weights: which family, which config, which scheduler. What can be said of a model before it is loaded."""

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

INDEX = INDEX_FILE
COMPONENTS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """What the json files of a pipeline say of its denoiser.

    Attributes:
        name: Path, hub id or architecture, as the user gave it.
        family: Name of its family.
        component: The denoiser's name in the pipeline.
        config: Its whole config, without diffusers' private keys.
        scheduler_class: The diffusers class of the pipeline's scheduler.
        pipeline: The pipeline's json files, by relative path.
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
        """Of the pipeline's scheduler, as its file says."""
        content: Mapping[str, Any] = self.pipeline[SCHEDULER_FILE]
        return content


def read_pipeline_config(directory: Path, name: str | None = None) -> PipelineConfig:
    """The outline of a local diffusers directory; only json is read.

    Args:
        directory: Of the pipeline.
        name: As the user gave it; None takes the directory.

    Raises:
        ArtifactError: No pipeline, or one without a scheduler.
        UnsupportedError: It has no denoiser, or no family carries its class or config.
    """
    name = name or str(directory)
    found_by = str(Path(name).resolve()) if Path(name).exists() else name  # from another working directory too
    index = read_json(directory / INDEX, what="diffusers pipeline")
    if "scheduler" not in index:
        raise ArtifactError(
            f"{name} is a pipeline without a scheduler; a trajectory needs one. Add {SCHEDULER_FILE} and its entry in {INDEX}."
        )
    component = next((component for component in COMPONENTS if component in index), None)
    if component is None:
        raise UnsupportedError(f"{name} is a {index.get('_class_name')} without a unet or transformer; there is no denoiser to quantize.")
    if index.get("requires_aesthetics_score"):
        raise UnsupportedError(
            f"{name} is an SDXL refiner: it only ever sees samples that the base model has nearly finished, and trajectories from noise would "
            "calibrate it on others. Quantize the base model, and leave the refiner in floating point."
        )
    family = name_of_family(str(index[component][1]))
    config = read_json(directory / component / "config.json", what="diffusers model")
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "some method")
        raise UnsupportedError(
            f"{name} is quantized already ({method}); expected float weights. Start from the model that it was made from."
        )
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
        pipeline=files | {INDEX: index | {SOURCE_KEY: found_by}},
    )
