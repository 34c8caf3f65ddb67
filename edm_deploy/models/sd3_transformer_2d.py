"""SD3Transformer2DModel: text and image tokens in joint attention, trained by flow matching (Stable Diffusion 3 and 3.5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor, nn

from edm_deploy.models._transformer import (
    ADAPTER,
    CONTROLNET,
    EMBEDDER,
    MODULATION,
    POOLED,
    TOKENS,
    CroppedPatches,
    TransformerFamily,
    ends,
)
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Guidance, ModelInput
from edm_deploy.network.placement import PlacementRule

TEXT_TOKENS = 77 + 256  # CLIP's, then T5's. Source: the default max_sequence_length of diffusers' StableDiffusion3Pipeline.
SCALE = 7.0  # Source: the default of diffusers' StableDiffusion3Pipeline.


class SD3Transformer2D(TransformerFamily):
    """Conditioning: `encoder_hidden_states` and `pooled_projections`. Positions are cropped from a stored grid, whose size limits height and width.

    Source: Esser et al., Scaling Rectified Flow Transformers, arXiv 2403.03206.
    """

    class_name = "SD3Transformer2DModel"
    model_class = SD3Transformer2DModel
    flow = True
    signature = (
        "hidden_states",
        TOKENS,
        POOLED,
        "timestep",
        "block_controlnet_hidden_states",
        "joint_attention_kwargs",
        "return_dict",
        "skip_layers",
    )
    refused: ClassVar[Mapping[str, str]] = {
        "block_controlnet_hidden_states": CONTROLNET,
        "joint_attention_kwargs": ADAPTER,
        "skip_layers": "skip-layer guidance skips layers, and the engine always computes all of them",
    }
    rules = (
        ends(r"pos_embed\.proj", "proj_out"),
        PlacementRule("^context_embedder$", "w8a8", "every block attends to its output"),
        EMBEDDER,
        MODULATION,
    )
    text_inputs = (TOKENS, POOLED)

    def build(self, config: Config) -> nn.Module:
        model = super().build(config)
        model.pos_embed = CroppedPatches(model.pos_embed)
        return model

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        sample = ModelInput(SAMPLE, "float", ("batch", int(config["in_channels"]), "height", "width"))
        tokens = ModelInput(TOKENS, "float", ("batch", "tokens", int(config["joint_attention_dim"])))
        return sample, TIMESTEP, tokens, ModelInput(POOLED, "float", ("batch", int(config["pooled_projection_dim"])))

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = model(inputs[SAMPLE], inputs[TOKENS], inputs[POOLED], inputs[TIMESTEP.name], return_dict=False)[0]
        return output

    def sizes(self, config: Config) -> dict[str, int]:
        return super().sizes(config) | {"tokens": TEXT_TOKENS}

    def limits(self, config: Config) -> dict[str, int]:
        largest = int(config["pos_embed_max_size"]) * int(config["patch_size"])
        return {"height": largest, "width": largest}

    def other_embedding_inputs(self, config: Config) -> str | None:
        return "the pooled prompt"

    def guidance(self, config: Config) -> Guidance:
        return Guidance("classifier-free", SCALE)

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Tokens and pooled prompt of unit variance."""
        return {
            TOKENS: torch.randn(batch, TEXT_TOKENS, int(config["joint_attention_dim"]), generator=generator),
            POOLED: torch.randn(batch, int(config["pooled_projection_dim"]), generator=generator),
        }

    def unconditional(self, config: Config, generator: torch.Generator) -> dict[str, Tensor]:
        """A random draw in place of the empty prompt."""
        return self.random_conditioning(config, 1, generator)

    def encode_prompts(self, config: Config, pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        if getattr(pipeline, "transformer", None) is None:
            # Without T5 the pipeline replaces its tokens by zeros, whose width it reads from the model's config.
            object.__setattr__(pipeline, "transformer", SimpleNamespace(config=self.freeze_config(config)))
        conditional, unconditional, pooled, unconditional_pooled = pipeline.encode_prompt(
            list(prompts), None, None, device=torch.device("cpu"), num_images_per_prompt=1, do_classifier_free_guidance=True
        )
        return {TOKENS: conditional, POOLED: pooled}, {TOKENS: unconditional[:1], POOLED: unconditional_pooled[:1]}


FAMILY = SD3Transformer2D()
