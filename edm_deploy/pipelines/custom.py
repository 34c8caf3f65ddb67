"""Pipelines that diffusers does not have: pixel-space sampling with any scheduler, and a latent model conditioned on a label token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from edm_deploy.errors import InputError
from edm_deploy.pipelines.guidance import Conditioning
from edm_deploy.pipelines.sampling import last_sample, trajectory

TOKENS = "encoder_hidden_states"


class UnconditionalPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Pixel-space sampling with any scheduler and any number of steps, unconditional or class-conditional.

    DDIMPipeline and DDPMPipeline of diffusers pass arguments to `step` that other schedulers refuse, and skip their input scaling.
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
            generator: Source of the initial noise and of a stochastic scheduler's noise.
            class_labels: int64 [batch_size], for class-conditional models.
            eta: Weight of DDIM's added noise, 0 to 1.
            output_type: `pil`, or `np` for float32 [B, H, W, C] in [0, 1].
            return_dict: Whether to wrap the images in diffusers' output class.
        """
        extra = {} if class_labels is None else {"class_labels": class_labels}

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            prediction: Tensor = self.unet(sample, timestep, **extra).sample
            return prediction

        noise = _noise(self.unet, batch_size, generator)
        steps = trajectory(denoise, self.scheduler, noise, steps=num_inference_steps, generator=generator, options={"eta": eta})
        images = images_from_sample(last_sample(steps))
        return _result(self, images, output_type, return_dict)


class ClassEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers ships no types
    """Embed a label as one cross-attention token. The last row of the table is the token for no label.

    Source: ClassEmbedder of github.com/CompVis/latent-diffusion, configs/latent-diffusion/cin256-v2.yaml (1001 rows, 1000 is no label).

    Args:
        num_classes: Number of labels, without the one for no label.
        embed_dim: Width of the token, the UNet's `cross_attention_dim`.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers ships no types
    def __init__(self, num_classes: int = 1000, embed_dim: int = 512) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, embed_dim)

    def forward(self, labels: Tensor) -> Tensor:
        """Tokens, float [B, 1, embed_dim], of labels, int64 [B]."""
        tokens: Tensor = self.embedding(labels)[:, None]
        return tokens


class ClassConditionalPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers ships no types
    """Sampling of a latent model whose label is a cross-attention token: LDM-4 on ImageNet, the model of the EfficientDM paper."""

    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(self, unet: nn.Module, scheduler: Any, vae: nn.Module, class_embedder: ClassEmbedder) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, vae=vae, class_embedder=class_embedder)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Sequence[int] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 3.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample an image for each label.

        Args:
            class_labels: int64 [B].
            num_inference_steps: Steps of the scheduler.
            guidance_scale: 1 is no guidance. Source of 3.0: EfficientDM's evaluation of LDM-4.
            generator: Source of the initial noise and of a stochastic scheduler's noise.
            eta: Weight of DDIM's added noise, 0 to 1.
            output_type: `pil`; `np` for float32 [B, H, W, C] in [0, 1]; `latent` for the latents before the VAE.
            return_dict: Whether to wrap the images in diffusers' output class.

        Raises:
            InputError: A label outside the model's classes, or of another type than an integer.
        """
        table = self.class_embedder
        labels = torch.as_tensor(class_labels).reshape(-1)
        classes = int(table.config.num_classes)
        if len(labels) and (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool):
            raise InputError(f"class_labels is of {labels.dtype}; expected integers, 0 to {classes - 1}. Pass int(label) of each.")
        labels = labels.to(torch.int64)
        if len(labels) == 0 or int(labels.min()) < 0 or int(labels.max()) >= classes:
            raise InputError(f"class_labels is {labels.tolist()}; expected one or more of 0 to {classes - 1}.")
        none = torch.tensor([classes])
        tokens, no_token = (table(index.to(table.device)).to(self.unet.device, self.unet.dtype) for index in (labels, none))
        conditioning = Conditioning({TOKENS: tokens}, {TOKENS: no_token}, guidance_scale)

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            return conditioning.combine(self.unet(**conditioning.inputs(sample, timestep)).sample)

        noise = _noise(self.unet, len(labels), generator)
        steps = trajectory(denoise, self.scheduler, noise, steps=num_inference_steps, generator=generator, options={"eta": eta})
        latents = last_sample(steps)
        if output_type == "latent":
            return _result(self, latents, output_type, return_dict)
        scale = float(self.vae.config.get("scaling_factor") or 1.0)
        return _result(self, images_from_sample(self.vae.decode(latents.to(self.vae.dtype) / scale).sample), output_type, return_dict)


def images_from_sample(sample: Tensor) -> Any:
    """Convert a pixel-space sample, float [B, C, H, W] in [-1, 1], to pixels: numpy float32 [B, H, W, C] in [0, 1]."""
    return (sample.float() / 2 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).numpy()


def _noise(unet: Any, count: int, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    size = unet.config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    shape = (count, unet.config["in_channels"], height, width)
    noise: Tensor = randn_tensor(shape, generator=generator, device=unet.device, dtype=unet.dtype)
    return noise


def _result(pipeline: Any, images: Any, output_type: str, return_dict: bool) -> ImagePipelineOutput | tuple[Any]:
    images = pipeline.numpy_to_pil(images) if output_type == "pil" else images
    return ImagePipelineOutput(images=images) if return_dict else (images,)
