"""Load the float model and the scheduler of a diffusers pipeline."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import safetensors
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from torch import nn

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, first_line
from edm_deploy.models import family_named
from edm_deploy.network.family import Config, Family
from edm_deploy.network.float_program import without_library_output
from edm_deploy.pipelines.model_index import PipelineConfig, read_pipeline_config
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.storage.directories import PIPELINE_FILES
from edm_deploy.storage.tensor_file import tensor_bytes
from edm_deploy.storage.variants import variant_of
from edm_deploy.storage.weight_loading import empty_model, load_weights, widen_while_running

log = logging.getLogger(__name__)

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_config.json", "adapter_model.safetensors")
LORA_PARTS = (".lora_", "lora_A.", "lora_B.", ".base_layer.", "_lora.")  # peft's names, and diffusers' old ones
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float model loaded from a diffusers pipeline.

    Attributes:
        name: Path or hub id, as the user specified it.
        family: Name of the model's family.
        config: Config of the model, without diffusers' private keys.
        model: The model, which computes in float32; in eval mode, without gradients, on the CPU. Its weights are float32 too, unless it was loaded
            with `low_memory`: then they are memory-mapped in the dtype of the files, and each layer is converted while it runs.
        scheduler: The pipeline's scheduler.
        pipeline: The pipeline's JSON files, by relative path.
        directory: Directory of the other components, such as text encoders and VAE; None where there are none.
    """

    name: str
    family: str
    config: Config
    model: nn.Module
    scheduler: Any  # diffusers' schedulers share no useful base class
    pipeline: Mapping[str, Any]
    directory: Path | None = None

    @property
    def family_object(self) -> Family:
        """The family that `family` names."""
        return family_named(self.family)

    @property
    def num_train_timesteps(self) -> int:
        """Length of the training schedule."""
        return int(self.scheduler.config.num_train_timesteps)

    def digest(self) -> str:
        """sha256 hex of the float weights converted to float32, one tensor at a time."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor_bytes(value.float() if value.is_floating_point() else value) if value.ndim else str(value.item()).encode())
        return digest.hexdigest()


def load_source(path_or_id: str | Path, *, low_memory: bool = False) -> Source:
    """Load the denoiser and scheduler of a local diffusers directory or a hub id.

    Args:
        path_or_id: The directory or hub id.
        low_memory: Leave the weights in their files until a layer runs, which is slower and changes no result.

    Raises:
        ArtifactError: There is no such directory, diffusers cannot read it, or its checkpoint is a pickle.
        UnsupportedError: No family supports the denoiser's class or config.
    """
    directory = local_directory(path_or_id)
    described = read_pipeline_config(directory, str(path_or_id))  # refuses unsupported models before any work
    _refuse_pickle(directory / described.component)
    _refuse_lora(directory, described.component)
    model_class = getattr(diffusers, described.family_object.class_name)
    if variant := variant_of(directory / described.component):
        log.warning("%s has weights of the variant %s only; they are loaded.", directory / described.component, variant)
    try:
        model = _streamed(described, directory / described.component, low_memory) or _by_diffusers(
            model_class, directory / described.component
        )
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise ArtifactError(
            f"{directory / described.component} cannot be read as {model_class.__name__}: {first_line(err)}. Download or save the model again."
        ) from err
    return Source(
        name=described.name,
        family=described.family,
        config=described.config,
        model=model.eval().requires_grad_(False),
        scheduler=scheduler_from_config(described.scheduler_class, described.scheduler_config),
        pipeline=described.pipeline,
        directory=directory,
    )


def float_artifact(source: Source) -> Artifact:
    """The float model as an artifact without quantized sites, which can be exported and built like any other."""
    return Artifact(
        family=source.family,
        config=source.config,
        timesteps=torch.zeros(1, dtype=torch.int32),
        row_of_timestep=torch.zeros(source.num_train_timesteps, dtype=torch.int32),
        sites={},
        params={name: value.detach().float() for name, value in source.model.state_dict().items()},
        provenance={"recipe": "none", "source": source.name},
        pipeline=source.pipeline,
    )


def _by_diffusers(model_class: Any, directory: Path) -> nn.Module:
    """Load the model with diffusers. A tensor that the files lack is an error here; diffusers would leave it random and log that."""
    with without_library_output():
        model, loading_info = model_class.from_pretrained(
            directory,
            variant=variant_of(directory),
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(loading_info["missing_keys"]):
        raise ValueError(f"the files hold no {missing[0]!r}" + (f" and {len(missing) - 1} more of its tensors" if missing[1:] else ""))
    loaded: nn.Module = model
    return loaded


def _streamed(described: PipelineConfig, directory: Path, low_memory: bool) -> nn.Module | None:
    """Load the model tensor by tensor; None where the files use older tensor names, which only diffusers can read."""
    model = empty_model(lambda: described.family_object.build(described.config))
    if not load_weights(model, directory, keep=low_memory):
        return None
    if low_memory:
        widen_while_running(model)
    return model


def local_directory(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a pipeline; downloaded from the hub where there is no directory of this name.

    Args:
        path_or_id: A directory or a hub id.
        weights: False downloads the JSON files only.

    Raises:
        ArtifactError: Neither the directory nor the hub id exists.
    """
    directory = Path(path_or_id)
    if directory.exists():
        return directory
    if str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") != 1:
        raise ArtifactError(f"{path_or_id} does not exist; expected a diffusers directory or a hub id such as google/ddpm-cifar10-32.")
    log.info("%s is not a local directory; downloading it from the hub", path_or_id)
    try:
        if not weights:
            return Path(snapshot_download(str(path_or_id), allow_patterns=[*PIPELINE_FILES, "*/config.json"]))
        return Path(DiffusionPipeline.download(str(path_or_id), use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as err:
        raise ArtifactError(
            f"{path_or_id} is not a local directory, and the hub does not provide it: {first_line(err)}. Check the path or the network."
        ) from err


def _refuse_pickle(directory: Path) -> None:
    if any(match for pattern in WEIGHT_FILES for match in directory.glob(pattern)):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in directory.glob(pattern))
    if pickles:
        raise ArtifactError(
            f"{directory / pickles[0]} is a pickle checkpoint, which can run code when it is loaded. "
            "Save the model as safetensors (save_pretrained(..., safe_serialization=True)) in an environment that you trust."
        )
    raise ArtifactError(f"{directory} holds no safetensors weights. Download or save the model again.")


def _refuse_lora(directory: Path, component: str) -> None:
    """Raises ArtifactError where the directory holds low-rank updates that are not fused: quantized without them, it would be another model."""
    remedy = (
        "Fuse it first, in diffusers: pipe.load_lora_weights(...); pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(...). "
        "Then quantize the saved pipeline."
    )
    for name in LORA_FILES:
        for home in (directory, directory / component):
            if (home / name).is_file():
                raise ArtifactError(f"{home / name} is a LoRA that is not fused into the model. {remedy} Or remove the file.")
    for path in sorted((directory / component).glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as stream:
                low_rank = next((key for key in stream.keys() if any(part in key for part in LORA_PARTS)), None)  # noqa: SIM118  # it is no dict
        except (safetensors.SafetensorError, OSError):
            return  # loading the weights reports it
        if low_rank:
            raise ArtifactError(f"{path} carries a LoRA that is not fused: it has a tensor {low_rank!r}. {remedy}")
