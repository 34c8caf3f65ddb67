"""diffusers pipelines from outside: a float model with its scheduler taken out of one, and one built around an engine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from edm_deploy.errors import ArtifactError, UnsupportedError, first_line
from edm_deploy.family import Config, Family, family_named
from edm_deploy.files import PIPELINE_FILES, read_json
from edm_deploy.lookup import suggestion
from edm_deploy.outline import Outline, read_outline
from edm_deploy.sampling import last_sample, trajectory
from edm_deploy.tensors import raw
from edm_deploy.weights import empty_model, fill, widen_while_running

log = logging.getLogger(__name__)

SCHEDULERS: Mapping[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}
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
    """

    name: str
    family: str
    config: Config
    model: nn.Module
    scheduler: Any  # diffusers' schedulers share no useful base class
    pipeline: Mapping[str, Any]

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
            digest.update(raw(value.float() if value.is_floating_point() else value) if value.ndim else str(value.item()).encode())
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
    outline = read_outline(directory, str(path_or_id))  # refuses what no family carries, before any work
    _refuse_pickle(directory / outline.component)
    model_class = getattr(diffusers, outline.family_object.class_name)
    try:
        model = _streamed(outline, directory / outline.component, low_memory) or model_class.from_pretrained(
            directory / outline.component, torch_dtype=torch.float32, low_cpu_mem_usage=False, use_safetensors=True
        )
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
    )


def _streamed(outline: Outline, directory: Path, low_memory: bool) -> nn.Module | None:
    """The model, filled tensor by tensor; None where the files name tensors otherwise, as old ones do: diffusers knows how to read those."""
    model = empty_model(lambda: outline.family_object.build(outline.config))
    if not fill(model, directory, keep=low_memory):
        return None
    if low_memory:
        widen_while_running(model)
    return model


def scheduler_named(name: str, config: Mapping[str, Any]) -> Any:
    """A scheduler by the name that users type (`ddim`, `euler`, ...), on the noise schedule of `config`.

    Raises:
        UnsupportedError: No such name.
    """
    if name not in SCHEDULERS:
        raise UnsupportedError(f"No scheduler {name!r}.{suggestion(name, SCHEDULERS)} Known: {', '.join(SCHEDULERS)}.")
    return scheduler_from_config(SCHEDULERS[name], config)


def scheduler_from_config(class_name: str, config: Mapping[str, Any]) -> Any:
    """A diffusers scheduler by class name; UnsupportedError where diffusers has none of that name."""
    scheduler_class = getattr(diffusers, class_name, None)
    if scheduler_class is None:
        raise UnsupportedError(
            f"diffusers {diffusers.__version__} has no scheduler {class_name!r}. Install the diffusers version that the model was saved with."
        )
    return scheduler_class.from_config({key: value for key, value in config.items() if not key.startswith("_")})


class UnconditionalPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Images from noise with any scheduler and any step count; class labels where the model takes them.

    diffusers' own DDIMPipeline and DDPMPipeline call `step` with arguments that other schedulers refuse and skip their input scaling.
    """

    def __init__(self, unet: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        class_labels: Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `batch_size` images.

        Args:
            batch_size: Number of images.
            num_inference_steps: Steps of the scheduler.
            generator: For the first noise, and for a stochastic scheduler's.
            class_labels: int64 [batch_size], for class-conditional models.
            eta: DDIM's share of fresh noise, 0 to 1.
            output_type: `pil`, or `np` for float32 [B, H, W, C] in [0, 1].
            return_dict: Whether to wrap the images in diffusers' output class.
        """
        config = self.unet.config
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        noise = randn_tensor(
            (batch_size, config["in_channels"], height, width), generator=generator, device=self.unet.device, dtype=self.unet.dtype
        )
        extra = {} if class_labels is None else {"class_labels": class_labels}

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            prediction: Tensor = self.unet(sample, timestep, **extra).sample
            return prediction

        steps = trajectory(denoise, self.scheduler, noise, steps=num_inference_steps, generator=generator, options={"eta": eta})
        images = images_from_sample(last_sample(steps))
        result = self.numpy_to_pil(images) if output_type == "pil" else images
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def images_from_sample(sample: Tensor) -> Any:
    """Pixels of a pixel-space sample: numpy float32 [B, H, W, C] in [0, 1], from float [B, C, H, W] in [-1, 1]."""
    return (sample.float() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()


def pipeline_from_directory(directory: Path, component: str, denoiser: nn.Module, *, scheduler: str | None = None) -> DiffusionPipeline:
    """The source pipeline, rebuilt around an engine.

    Args:
        directory: Holds the pipeline's json files.
        component: The denoiser's name in it, `unet` or `transformer`.
        denoiser: The drop-in.
        scheduler: Another scheduler's name; None keeps the source's.

    Raises:
        ArtifactError: The directory holds no pipeline.
        UnsupportedError: A component of the pipeline is not in the directory.
    """
    index = read_json(directory / "model_index.json", what="pipeline")
    config = read_json(directory / "scheduler" / "scheduler_config.json", what="pipeline")
    chosen = scheduler_named(scheduler, config) if scheduler else scheduler_from_config(str(index["scheduler"][1]), config)
    others = [
        name for name, value in index.items() if not name.startswith("_") and name not in ("scheduler", component) and value and value[0]
    ]
    if not others:
        return UnconditionalPipeline(denoiser, chosen)
    missing = [name for name in others if not (directory / name).is_dir()]
    if missing:
        raise UnsupportedError(
            f"{directory} has no {missing[0]!r}, which a {index['_class_name']} needs. Load your own pipeline and put the engine in: "
            f"pipe.{component} = edm_deploy.load_denoiser({str(directory)!r})."
        )
    pipeline_class = getattr(diffusers, str(index["_class_name"]))
    return pipeline_class.from_pretrained(directory, **{component: denoiser, "scheduler": chosen})


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
