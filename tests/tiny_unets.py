"""Whole pipelines of the latent UNets, tiny and seeded: SDXL, Stable Diffusion 2, inpainting, and a latent model that is told a label."""

from __future__ import annotations

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)

from edm_deploy.pipelines.custom import ClassConditionalPipeline, ClassEmbedder
from tests.conftest import TINY, VARIANTS
from tests.tiny_pipelines import tiny_text_encoder, tiny_tokenizer, tiny_vae
from tests.tiny_transformers import tiny_clip

LABELS = 5
NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}  # of all Stable Diffusions


def tiny_pipeline(kind: str) -> DiffusionPipeline:
    """The diffusers pipeline of one of MAKERS, on its own model class."""
    _, config = (TINY | VARIANTS)[CONFIGS.get(kind, kind)]
    torch.manual_seed(0)
    pipeline = MAKERS[kind](UNet2DConditionModel.from_config(config).eval().requires_grad_(False))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _sd(unet):
    return StableDiffusionPipeline(**_prompted(unet), scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, **NOISE))


def _sd2(unet):
    scheduler = DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1, set_alpha_to_one=False, **NOISE)
    return StableDiffusionPipeline(**_prompted(unet), scheduler=scheduler)


def _inpainting(unet):
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False, **NOISE)
    return StableDiffusionInpaintPipeline(**_prompted(unet), scheduler=scheduler)


def _sdxl(unet):
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    return StableDiffusionXLPipeline(
        vae=tiny_vae().eval(),
        text_encoder=tiny_clip(4),
        text_encoder_2=tiny_clip(unet.config.cross_attention_dim - 4, pooled),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1, **NOISE),
        add_watermarker=False,
    )


def _ldm(unet):
    vae = VQModel(latent_channels=3, block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16).eval()
    scheduler = DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    return ClassConditionalPipeline(unet, scheduler, vae, ClassEmbedder(LABELS, unet.config.cross_attention_dim))


def _prompted(unet):
    parts = {"vae": tiny_vae().eval(), "text_encoder": tiny_text_encoder(unet.config.cross_attention_dim).eval()}
    parts |= {"tokenizer": tiny_tokenizer(), "unet": unet, "safety_checker": None, "feature_extractor": None}
    return parts | {"requires_safety_checker": False}


CONFIGS = {"sd": "unet2d-condition"}
MAKERS = {"sd": _sd, "sd2": _sd2, "inpainting": _inpainting, "sdxl": _sdxl, "ldm": _ldm}
