"""UNet2DConditionModel: latent denoisers with cross-attention (Stable Diffusion 1.x and 2.x, SDXL, inpainting, LDM with a label token)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.models._lora import from_original_unet
from edm_deploy.models._unet import UNetFamily
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Guidance, ModelInput

TOKENS = "encoder_hidden_states"
POOLED, TIME_IDS = "text_embeds", "time_ids"  # of SDXL: the pooled prompt; original size, crop and target size
CLIP_TOKENS = 77
NUM_TIME_IDS = 6
MASK_AND_IMAGE = 5  # conditioning channels of an inpainting model: one of the mask, four of the masked image
PIXELS_PER_LATENT = 8
TEXT_SCALE = 7.5  # Source: the default of diffusers' StableDiffusionPipeline.
SDXL_SCALE = 5.0  # Source: the default of diffusers' StableDiffusionXLPipeline.

REFUSED_CONFIG = {
    "encoder_hid_dim_type": "IP-Adapter and text projections before the UNet are not supported; unload the adapter",
    "class_embed_type": "class labels in addition to tokens are not supported",
    "num_class_embeds": "class labels in addition to tokens are not supported",
    "time_cond_proj_dim": "a guidance scale embedded with the timestep (LCM) is not supported",
}
REFUSED_ARGUMENTS = {
    "encoder_attention_mask": "attention covers every text token; pad prompts as the pipeline does, without a mask",
    "attention_mask": "attention covers every text token; pad prompts as the pipeline does, without a mask",
    "down_block_additional_residuals": "ControlNet's and T2I adapters' residuals enter between the blocks of a float model",
    "mid_block_additional_residual": "ControlNet's residuals enter between the blocks of a float model",
    "down_intrablock_additional_residuals": "T2I adapters' residuals enter between the blocks of a float model",
    "cross_attention_kwargs": "a LoRA of an engine is weighted by its set_adapters",
    "timestep_cond": "a guidance scale embedded with the timestep is not supported",
    "image_embeds": "IP-Adapter's image tokens are not supported",
}


class UNet2DCondition(UNetFamily):
    """Conditioning: `encoder_hidden_states`, and in SDXL `text_embeds` and `time_ids`, which its pipelines pass as `added_cond_kwargs`."""

    class_name = "UNet2DConditionModel"
    model_class = UNet2DConditionModel
    output_class = UNet2DConditionOutput
    signature = (
        SAMPLE,
        "timestep",
        TOKENS,
        "class_labels",
        "timestep_cond",
        "attention_mask",
        "cross_attention_kwargs",
        "added_cond_kwargs",
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
        "encoder_attention_mask",
        "return_dict",
    )
    text_inputs = (TOKENS, POOLED)

    def build(self, config: Config) -> nn.Module:
        for key, reason in REFUSED_CONFIG.items():
            if config.get(key) is not None:
                raise UnsupportedError(f"UNet2DConditionModel with {key}={config[key]!r}: {reason}.")
        if config.get("addition_embed_type") not in (None, "text_time"):
            raise UnsupportedError(
                f"UNet2DConditionModel with addition_embed_type={config['addition_embed_type']!r}: expected none, or SDXL's 'text_time'."
            )
        if config.get("attention_type", "default") != "default":
            raise UnsupportedError(
                f"UNet2DConditionModel with attention_type={config['attention_type']!r}: GLIGEN's boxes are not supported."
            )
        if config.get("dual_cross_attention"):
            raise UnsupportedError(
                "UNet2DConditionModel with dual_cross_attention=True: two texts in one cross-attention (Versatile Diffusion) are not supported."
            )
        full = self.full_config(config)
        if full["in_channels"] < full["out_channels"]:
            raise UnsupportedError(
                f"UNet2DConditionModel with in_channels={full['in_channels']} and out_channels={full['out_channels']}: expected as many input as "
                "output channels, or more (inpainting). A learned variance is not supported."
            )
        return super().build(config)

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        sample = ModelInput(SAMPLE, "float", ("batch", int(config["in_channels"]), "height", "width"))
        tokens = ModelInput(TOKENS, "float", ("batch", "tokens", _token_width(config)))
        if not _is_sdxl(config):
            return sample, TIMESTEP, tokens
        # float32: float16 cannot represent a size of 2049.
        sizes = ModelInput(TIME_IDS, "float32", ("batch", NUM_TIME_IDS))
        return sample, TIMESTEP, tokens, ModelInput(POOLED, "float", ("batch", _pooled_width(config))), sizes

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        # Both as float32: diffusers concatenates them, and sizes are float32. torch promotes types; ONNX has no Concat of two types.
        added = {name: inputs[name].float() for name in (POOLED, TIME_IDS) if name in inputs}
        output: Tensor = model(inputs[SAMPLE], inputs[TIMESTEP.name], inputs[TOKENS], added_cond_kwargs=added, return_dict=False)[0]
        return output

    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments = self.arguments(args, kwargs)
        arguments |= arguments.pop("added_cond_kwargs", None) or {}
        arguments = {name: value for name, value in arguments.items() if not (name == "cross_attention_kwargs" and not value)}
        for name, reason in REFUSED_ARGUMENTS.items():
            if arguments.get(name) is not None:
                raise UnsupportedError(f"The engine has no input {name!r}: {reason}.")
        return super().bind(config, (), arguments)

    def latent_shape(self, config: Config) -> tuple[int, ...]:
        return int(config["out_channels"]), *self.sample_shape(config)[1:]

    def sizes(self, config: Config) -> dict[str, int]:
        return super().sizes(config) | {"tokens": CLIP_TOKENS}

    def attributes(self, config: Config) -> dict[str, Any]:
        if not _is_sdxl(config):
            return {}
        width = int(config["projection_class_embeddings_input_dim"])
        return {"add_embedding": SimpleNamespace(linear_1=SimpleNamespace(in_features=width))}  # read by SDXL's pipelines

    def guidance(self, config: Config) -> Guidance:
        return Guidance("classifier-free", SDXL_SCALE if _is_sdxl(config) else TEXT_SCALE)

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Tokens of unit variance, as after a text encoder's last layer norm; SDXL's sizes are those of an uncropped image."""
        drawn = {TOKENS: torch.randn(batch, CLIP_TOKENS, _token_width(config), generator=generator)}
        if _is_sdxl(config):
            _, height, width = (PIXELS_PER_LATENT * size for size in self.sample_shape(config))
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            drawn |= {POOLED: torch.randn(batch, _pooled_width(config), generator=generator), TIME_IDS: sizes.repeat(batch, 1)}
        return drawn

    def extra_channels(self, config: Config, batch: int, generator: torch.Generator) -> Tensor | None:
        """Inpainting: the mask of a rectangle, and latents of unit variance outside it. In other models: latents of unit variance."""
        _, height, width = self.sample_shape(config)
        channels = int(config["in_channels"]) - int(config["out_channels"])
        if channels == 0:
            return None
        if channels != MASK_AND_IMAGE:
            return torch.randn(batch, channels, height, width, generator=generator)
        mask = torch.stack([_rectangle(height, width, generator) for _ in range(batch)])[:, None]
        image = torch.randn(batch, channels - 1, height, width, generator=generator)
        return torch.cat([mask, image * (1 - mask)], dim=1)

    def unconditional(self, config: Config, generator: torch.Generator) -> dict[str, Tensor]:
        """A random draw in place of the empty prompt; zeros for SDXL (`force_zeros_for_empty_prompt`)."""
        if _is_sdxl(config):
            return {TOKENS: torch.zeros(1, CLIP_TOKENS, _token_width(config)), POOLED: torch.zeros(1, _pooled_width(config))}
        return {TOKENS: torch.randn(1, CLIP_TOKENS, _token_width(config), generator=generator)}

    def published_lora(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_original_unet(config, tensors)

    def encode_prompts(self, config: Config, pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        encoded = pipeline.encode_prompt(
            prompt=list(prompts), device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        if not _is_sdxl(config):
            conditional, unconditional = encoded
            return {TOKENS: conditional}, {TOKENS: unconditional[:1]}
        conditional, unconditional, pooled, unconditional_pooled = encoded
        return {TOKENS: conditional, POOLED: pooled}, {TOKENS: unconditional[:1], POOLED: unconditional_pooled[:1]}


def _is_sdxl(config: Config) -> bool:
    return config.get("addition_embed_type") == "text_time"


def _pooled_width(config: Config) -> int:
    return int(config["projection_class_embeddings_input_dim"]) - NUM_TIME_IDS * int(config["addition_time_embed_dim"])


def _token_width(config: Config) -> int:
    widths = config["cross_attention_dim"]
    widths = {widths} if isinstance(widths, int) else set(widths)
    if len(widths) != 1:
        raise UnsupportedError(f"cross_attention_dim {config['cross_attention_dim']!r} differs by block; expected one number.")
    return int(widths.pop())


def _rectangle(height: int, width: int, generator: torch.Generator) -> Tensor:
    """A mask, float32 [height, width]: 1 in a rectangle that covers a quarter to all of either side, 0 outside it."""
    mask = torch.zeros(height, width)
    spans = []
    for size in (height, width):
        length = int(torch.randint(max(1, size // 4), size + 1, (1,), generator=generator))
        start = int(torch.randint(0, size - length + 1, (1,), generator=generator))
        spans.append(slice(start, start + length))
    mask[spans[0], spans[1]] = 1
    return mask


FAMILY = UNet2DCondition()
