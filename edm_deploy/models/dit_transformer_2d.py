"""DiTTransformer2DModel: class-conditional latent transformers (DiT-XL/2) that predict noise and variance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn
from torch.nn import functional

from edm_deploy.models._transformer import EMBEDDER, MODULATION, Patches, TransformerFamily, ends, unpatchify
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Guidance, ModelInput

LABELS = "class_labels"
SCALE = 4.0  # Source: the default of diffusers' DiTPipeline; arXiv 2212.09748 samples its figures with it.


class DiTTransformer2D(TransformerFamily):
    """Conditioning: `class_labels`; the label after the last class means no class. Guidance applies to the noise, not to the variance.

    Source: Peebles and Xie, Scalable Diffusion Models with Transformers, arXiv 2212.09748.
    """

    class_name = "DiTTransformer2DModel"
    model_class = DiTTransformer2DModel
    signature = ("hidden_states", "timestep", LABELS, "cross_attention_kwargs", "return_dict")
    refused: ClassVar[Mapping[str, str]] = {"cross_attention_kwargs": "this model has no cross-attention"}
    rules = (ends(r"pos_embed\.proj", r"proj_out_2"), EMBEDDER, MODULATION)

    def build(self, config: Config) -> nn.Module:
        model = super().build(config)
        model.pos_embed = Patches(model.pos_embed)
        return model

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        sample = ModelInput(SAMPLE, "float", ("batch", int(config["in_channels"]), "height", "width"))
        return sample, TIMESTEP, ModelInput(LABELS, "int64", ("batch",))

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The model's `forward` with two differences: height and width may differ, and the first block's embedding of timestep and label, which the
        output layers read too, is computed once, so that each weight is in the graph once.
        """
        net: Any = model  # diffusers is untyped
        sample, timestep, labels = inputs[SAMPLE], inputs[TIMESTEP.name], inputs[LABELS]
        embedded: list[Tensor] = []
        hook = net.transformer_blocks[0].norm1.emb.register_forward_hook(lambda _, __, output: embedded.append(output))
        try:
            tokens = net.pos_embed(sample)
            for block in net.transformer_blocks:
                tokens = block(tokens, timestep=timestep, class_labels=labels)
        finally:
            hook.remove()
        shift, scale = net.proj_out_1(functional.silu(embedded[0])).chunk(2, dim=1)
        tokens = net.proj_out_2(net.norm_out(tokens) * (1 + scale[:, None]) + shift[:, None])
        patch = int(net.config.patch_size)
        return unpatchify(tokens, sample.shape[2] // patch, sample.shape[3] // patch, patch)

    def prediction(self, config: Config, output: Tensor) -> Tensor:
        return output[:, : int(config["in_channels"])]

    def classes(self, config: Config) -> int | None:
        return int(config["num_embeds_ada_norm"])

    def labels(self, config: Config) -> int | None:
        return int(config["num_embeds_ada_norm"]) + 1

    def other_embedding_inputs(self, config: Config) -> str | None:
        return "the class label"

    def guidance(self, config: Config) -> Guidance:
        return Guidance("classifier-free", SCALE)

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {LABELS: torch.randint(0, int(config["num_embeds_ada_norm"]), (batch,), generator=generator)}

    def unconditional(self, config: Config, generator: torch.Generator) -> dict[str, Tensor]:
        return {LABELS: torch.tensor([int(config["num_embeds_ada_norm"])])}


FAMILY = DiTTransformer2D()
