"""Whole pipelines of the transformer families, tiny and seeded: their own text encoders, tokenizers and VAE, schedulers as they are shipped with."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    DiTPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5Tokenizer

from edm_deploy.models import family_named
from tests.conftest import TINY
from tests.tiny_pipelines import LETTERS, VOCABULARY, tiny_tokenizer

LABELS = {"0": "tench", "1": "goldfish, Carassius auratus"}  # a part of ImageNet's; the pipeline finds labels by their names
T5_MARKS = ["<pad>", "</s>", "<unk>", "\u2581"]  # the last begins a word


def tiny_pipeline(kind: str) -> DiffusionPipeline:
    """The diffusers pipeline of one of TINY, on its own model class; `sd3-without-t5` is SD3 whose third text encoder was left out."""
    name, config = TINY[kind.removesuffix("-without-t5")]
    torch.manual_seed(0)
    model = family_named(name).model_class.from_config(config).eval().requires_grad_(False)
    pipeline = MAKERS[name](model, t5=not kind.endswith("-without-t5"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_vae() -> AutoencoderKL:
    """Halves the size three times."""
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
        sample_size=64,
        shift_factor=0.0,
    ).eval()


def tiny_t5_tokenizer(longest: int = 512) -> T5Tokenizer:
    """Every character a token of its own, and one that begins each word."""
    vocabulary = [(token, 0.0) for token in T5_MARKS] + [(letter, -3.0) for letter in LETTERS]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=longest)


def tiny_t5(width: int) -> T5EncoderModel:
    """One layer."""
    config = T5Config(vocab_size=len(T5_MARKS) + len(LETTERS), d_model=width, d_kv=4, d_ff=2 * width, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def tiny_clip(width: int, projection: int | None = None) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Two layers, because SD3 reads the last but one; with a projection of the pooled prompt where a width is given."""
    last = len(VOCABULARY) - 1
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=projection or width,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def _dit(model, t5):
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return DiTPipeline(model, tiny_vae(), scheduler, id2label=LABELS)


def _pixart(model, t5):
    scheduler = DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    return PixArtAlphaPipeline(tiny_t5_tokenizer(), tiny_t5(model.config.caption_channels), tiny_vae(), model, scheduler)


def _sd3(model, t5):
    config = model.config
    widths, projections = (4, config.joint_attention_dim - 4), (8, config.pooled_projection_dim - 8)
    clips = [tiny_clip(*sizes) for sizes in zip(widths, projections, strict=True)]
    third = (tiny_t5(config.joint_attention_dim), tiny_t5_tokenizer()) if t5 else (None, None)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(model, scheduler, tiny_vae(), clips[0], tiny_tokenizer(), clips[1], tiny_tokenizer(), *third)


def _flux(model, t5):
    config = model.config
    scheduler = (
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        if config.guidance_embeds
        else FlowMatchEulerDiscreteScheduler()
    )
    clip = tiny_clip(config.pooled_projection_dim), tiny_tokenizer()
    return FluxPipeline(scheduler, tiny_vae(), *clip, tiny_t5(config.joint_attention_dim), tiny_t5_tokenizer(), model)


MAKERS = {"dit-transformer-2d": _dit, "pixart-transformer-2d": _pixart, "sd3-transformer-2d": _sd3, "flux-transformer-2d": _flux}
