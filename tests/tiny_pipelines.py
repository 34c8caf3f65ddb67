"""Whole latent pipelines, tiny and seeded: real text encoders and VAE of shrunk configs, with a vocabulary of single characters."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tests.conftest import tiny_model

LETTERS = [chr(code) for code in range(33, 127)]
VOCABULARY = {
    token: index for index, token in enumerate([*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"])
}


def tiny_tokenizer() -> CLIPTokenizer:
    """Every character a token of its own."""
    return CLIPTokenizer(vocab=VOCABULARY, merges=[], model_max_length=77)


def tiny_text_encoder(width: int) -> CLIPTextModel:
    """One layer."""
    last = len(VOCABULARY) - 1
    config = CLIPTextConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )
    return CLIPTextModel(config)


def tiny_vae() -> AutoencoderKL:
    """Halves height and width once."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def stable_diffusion() -> StableDiffusionPipeline:
    """Stable Diffusion's shape, with the scheduler that it is shipped with."""
    _, _, unet = tiny_model("unet2d-condition")
    torch.manual_seed(0)
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_text_encoder(12),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=PNDMScheduler(skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def saved(path: Path) -> Path:
    """Stable Diffusion in a directory."""
    stable_diffusion().save_pretrained(path)
    return path
