"""diffusers pipelines from outside: a float model with its scheduler, taken out of one."""

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
from edm_deploy.network.float_program import quiet
from edm_deploy.pipelines.model_index import PipelineConfig, read_pipeline_config
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.storage.directories import PIPELINE_FILES
from edm_deploy.storage.tensor_file import tensor_bytes
from edm_deploy.storage.weight_loading import empty_model, load_weights, widen_while_running

log = logging.getLogger(__name__)

LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_config.json", "adapter_model.safetensors")
LORA_PARTS = (".lora_", "lora_A.", "lora_B.", ".base_layer.", "_lora.")  # peft's names, and diffusers' old ones
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """A float model as it comes from diffusers.

    Attributes:
        name: Path or hub id, as the user gave it.
        family: Name of its family.
        config: Its config, without diffusers' private keys.
        model: Computes in float32; in eval mode, without gradients, on the CPU. Its weights are float32 too, unless it was loaded with
            `low_memory`: then they lie as the files have them, mapped, and each layer is widened while it runs.
        scheduler: The pipeline's own scheduler.
        pipeline: The pipeline's json files, by relative path.
        directory: Where the rest of the pipeline is, text encoders and VAE; None where there is no rest.
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
        """sha256 hex of the float weights, as float32 whatever they are stored in; one tensor at a time."""
        digest = hashlib.sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor_bytes(value.float() if value.is_floating_point() else value) if value.ndim else str(value.item()).encode())
        return digest.hexdigest()


def load_source(path_or_id: str | Path, *, low_memory: bool = False) -> Source:
    """The denoiser and scheduler of a local diffusers directory or a hub id.

    Args:
        path_or_id: The directory or hub id.
        low_memory: Leave the weights in their files until a layer runs, which takes time and changes no result.

    Raises:
        ArtifactError: Nothing there, or nothing that diffusers can read; a checkpoint in pickle form is refused.
        UnsupportedError: No family answers for the denoiser's class.
    """
    directory = local_directory(path_or_id)
    outline = read_pipeline_config(directory, str(path_or_id))  # refuses what no family carries, before any work
    _refuse_pickle(directory / outline.component)
    _refuse_lora(directory, outline.component)
    model_class = getattr(diffusers, outline.family_object.class_name)
    try:
        model = _streamed(outline, directory / outline.component, low_memory) or _by_diffusers(model_class, directory / outline.component)
    except (OSError, ValueError, RuntimeError, KeyError) as err:
        raise ArtifactError(
            f"{directory / outline.component} cannot be read as {model_class.__name__}: {first_line(err)}. Download or save the model again."
        ) from err
    return Source(
        name=outline.name,
        family=outline.family,
        config=outline.config,
        model=model.eval().requires_grad_(False),
        scheduler=scheduler_from_config(outline.scheduler_class, outline.scheduler_config),
        pipeline=outline.pipeline,
        directory=directory,
    )


def float_artifact(source: Source) -> Artifact:
    """The float model as an artifact without quantized sites, which goes the same way as any other."""
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
    """The model as diffusers reads it; it would leave a tensor that the files do not name at random, and say so in a log."""
    with quiet():
        model, seen = model_class.from_pretrained(
            directory, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True, output_loading_info=True
        )
    if missing := sorted(seen["missing_keys"]):
        raise ValueError(f"the files hold no {missing[0]!r}" + (f" and {len(missing) - 1} more of its tensors" if missing[1:] else ""))
    loaded: nn.Module = model
    return loaded


def _streamed(outline: PipelineConfig, directory: Path, low_memory: bool) -> nn.Module | None:
    """The model, filled tensor by tensor; None where the files name tensors otherwise, as old ones do: diffusers knows how to read those."""
    model = empty_model(lambda: outline.family_object.build(outline.config))
    if not load_weights(model, directory, keep=low_memory):
        return None
    if low_memory:
        widen_while_running(model)
    return model


def local_directory(path_or_id: str | Path, *, weights: bool = True) -> Path:
    """The local directory of a pipeline, asked of the hub where there is none of that name.

    Args:
        path_or_id: A directory or a hub id.
        weights: False fetches the json files only.

    Raises:
        ArtifactError: Neither here nor on the hub.
    """
    directory = Path(path_or_id)
    if directory.exists():
        return directory
    if str(path_or_id).startswith((".", "/", "~")) or str(path_or_id).count("/") != 1:
        raise ArtifactError(f"{path_or_id} does not exist; expected a diffusers directory or a hub id such as google/ddpm-cifar10-32.")
    log.info("no such directory, asking the hub for %s", path_or_id)
    try:
        if not weights:
            return Path(snapshot_download(str(path_or_id), allow_patterns=[*PIPELINE_FILES, "*/config.json"]))
        return Path(DiffusionPipeline.download(str(path_or_id), use_safetensors=True))
    except (OSError, ValueError, RuntimeError) as err:
        raise ArtifactError(
            f"{path_or_id} is no local directory, and the hub does not give it: {first_line(err)}. Check the path or the network."
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
    """Raises ArtifactError where low-rank updates lie in or beside the weights: quantized without them, the model would be another one."""
    mend = (
        "Fuse it first, in diffusers: pipe.load_lora_weights(...); pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(...). "
        "Then quantize what was saved."
    )
    for name in LORA_FILES:
        for home in (directory, directory / component):
            if (home / name).is_file():
                raise ArtifactError(f"{home / name} is a LoRA that is not fused into the model. {mend} Or take the file away.")
    for path in sorted((directory / component).glob("*.safetensors")):
        try:
            with safetensors.safe_open(path, framework="pt") as stream:
                found = next((key for key in stream.keys() if any(part in key for part in LORA_PARTS)), None)  # noqa: SIM118  # it is no dict
        except (safetensors.SafetensorError, OSError):
            return  # who reads the weights says what is wrong with them
        if found:
            raise ArtifactError(f"{path} carries a LoRA that is not fused: it has a tensor {found!r}. {mend}")
