"""PixArtTransformer2DModel: text-to-image latent transformers with cross-attention and a learned variance (PixArt-alpha and -Sigma)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.models._transformer import EMBEDDER, MODULATION, TOKENS, Patches, TransformerFamily, ends, unpatchify
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Guidance, ModelInput
from edm_deploy.network.placement import PlacementRule

MASK, RESOLUTION, ASPECT = "encoder_attention_mask", "resolution", "aspect_ratio"
MASKED = -10000.0  # added by diffusers to the attention score of a masked token
T5_TOKENS = 120  # Source: the default max_sequence_length of diffusers' PixArtAlphaPipeline.
PIXELS_PER_LATENT = 8
SCALE = 4.5  # Source: the default of diffusers' PixArtAlphaPipeline.


class PixArtTransformer2D(TransformerFamily):
    """Conditioning: text tokens with their mask, and in the models of 1024 pixels the resolution and aspect ratio of the image.

    Source: Chen et al., PixArt-alpha, arXiv 2310.00426.
    """

    class_name = "PixArtTransformer2DModel"
    model_class = PixArtTransformer2DModel
    signature = (
        "hidden_states",
        TOKENS,
        "timestep",
        "added_cond_kwargs",
        "cross_attention_kwargs",
        "attention_mask",
        MASK,
        "return_dict",
    )
    refused: ClassVar[Mapping[str, str]] = {
        "cross_attention_kwargs": "a LoRA of an engine is weighted by its set_adapters",
        "attention_mask": "attention covers every image token",
    }
    rules = (
        PlacementRule(
            r"(resolution|aspect_ratio)_embedder",
            "float",
            "it embeds two sizes per sample in one batch, so that its rows are not those of the samples; few weights",
        ),
        ends(r"pos_embed\.proj", "proj_out"),
        PlacementRule(r"^caption_projection\.", "w8a8", "every block attends to its output"),
        EMBEDDER,
        MODULATION,
    )
    text_inputs = (TOKENS, MASK)

    def build(self, config: Config) -> nn.Module:
        if config.get("attention_type", "default") != "default":
            raise UnsupportedError(
                f"{self.class_name} with attention_type={config['attention_type']!r}: GLIGEN's boxes are not supported; expected 'default'."
            )
        model = super().build(config)
        model.pos_embed = Patches(model.pos_embed)
        return model

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        sample = ModelInput(SAMPLE, "float", ("batch", int(config["in_channels"]), "height", "width"))
        text = ModelInput(TOKENS, "float", ("batch", "tokens", _token_width(config))), ModelInput(MASK, "float", ("batch", "tokens"))
        if not _takes_size(config):
            return sample, TIMESTEP, *text
        # float32: float16 cannot represent a size of 2049.
        return sample, TIMESTEP, *text, ModelInput(RESOLUTION, "float32", ("batch", 2)), ModelInput(ASPECT, "float32", ("batch", 1))

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's `forward` without its squeeze of the token axis, which affects only an image of one patch and gives an output of unknown rank."""
        net: Any = model  # diffusers is untyped
        sample, text, mask = inputs[SAMPLE], inputs[TOKENS], inputs[MASK]
        added = {name: inputs.get(name) for name in (RESOLUTION, ASPECT)}
        tokens = net.pos_embed(sample)
        modulation, embedded = net.adaln_single(inputs[TIMESTEP.name], added, batch_size=sample.shape[0], hidden_dtype=tokens.dtype)
        if net.caption_projection is not None:
            text = net.caption_projection(text)
        bias = ((1 - mask.to(tokens.dtype)) * MASKED)[:, None]
        for block in net.transformer_blocks:
            tokens = block(tokens, encoder_hidden_states=text, encoder_attention_mask=bias, timestep=modulation)
        shift, scale = (net.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        tokens = net.proj_out(net.norm_out(tokens) * (1 + scale) + shift)
        patch = int(net.config.patch_size)
        return unpatchify(tokens, sample.shape[2] // patch, sample.shape[3] // patch, patch)

    def prediction(self, config: Config, output: Tensor) -> Tensor:
        return output[:, : int(config["in_channels"])]

    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments = self.arguments(args, kwargs)
        arguments |= arguments.pop("added_cond_kwargs", None) or {}
        return super().bind(config, (), arguments)

    def sizes(self, config: Config) -> dict[str, int]:
        return super().sizes(config) | {"tokens": T5_TOKENS}

    def time_only(self, config: Config) -> str | None:
        return None if _takes_size(config) else r"^adaln_single\.(emb\.timestep_embedder\.|linear$)"

    def other_embedding_inputs(self, config: Config) -> str | None:
        return "the size of the image" if _takes_size(config) else None

    def guidance(self, config: Config) -> Guidance:
        return Guidance("classifier-free", SCALE)

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Tokens of unit variance; the mask keeps a random number of them, 1 or more."""
        lengths = torch.randint(1, T5_TOKENS + 1, (batch, 1), generator=generator)
        drawn = {
            TOKENS: torch.randn(batch, T5_TOKENS, _token_width(config), generator=generator),
            MASK: (torch.arange(T5_TOKENS) < lengths).float(),
        }
        if _takes_size(config):
            _, height, width = (PIXELS_PER_LATENT * size for size in self.sample_shape(config))
            drawn |= {RESOLUTION: torch.tensor([[height, width]]).float().repeat(batch, 1), ASPECT: torch.full((batch, 1), height / width)}
        return drawn

    def unconditional(self, config: Config, generator: torch.Generator) -> dict[str, Tensor]:
        """Random tokens, of which the mask keeps one: the end-of-text token of an empty prompt."""
        mask = (torch.arange(T5_TOKENS) < 1).float()[None]
        return {TOKENS: torch.randn(1, T5_TOKENS, _token_width(config), generator=generator), MASK: mask}

    def encode_prompts(self, config: Config, pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        # With the pipeline's default number of tokens, which is 300 for PixArt-Sigma.
        conditional, mask, unconditional, unconditional_mask = pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=True, num_images_per_prompt=1, device=torch.device("cpu")
        )
        return {TOKENS: conditional, MASK: mask.float()}, {TOKENS: unconditional[:1], MASK: unconditional_mask[:1].float()}


def _takes_size(config: Config) -> bool:
    """Whether resolution and aspect ratio are inputs. Source: diffusers' PixArtTransformer2DModel, whose default depends on the size."""
    requested = config.get("use_additional_conditions")
    return config["sample_size"] == 128 if requested is None else bool(requested)


def _token_width(config: Config) -> int:
    return int(config.get("caption_channels") or config["cross_attention_dim"])


FAMILY = PixArtTransformer2D()
