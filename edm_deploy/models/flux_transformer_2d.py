"""FluxTransformer2DModel: packed latents and text tokens with rotary positions, trained by flow matching (FLUX.1 dev and schnell)."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from edm_deploy.models._lora import from_original_flux
from edm_deploy.models._transformer import ADAPTER, CONTROLNET, EMBEDDER, MODULATION, POOLED, TOKENS, TransformerFamily, ends
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Guidance, ModelInput, is_dense, timestep_tensor
from edm_deploy.network.graph_names import SCALE_INPUT
from edm_deploy.network.placement import PlacementRule

IMAGE_IDS, TEXT_IDS = "img_ids", "txt_ids"
IMAGE_TOKENS = "image_tokens"
TEXT_TOKENS = 512  # Source: the default max_sequence_length of diffusers' FluxPipeline.
SIZE = "sample_size"
LATENT_SIZE = 128  # 1024 pixels; FLUX's published config has no sample_size
PACKED = 2  # latents per token in each direction
SCALE = 3.5  # Source: the default of diffusers' FluxPipeline.
TIMESTEPS = 1000  # FLUX takes sigmas in [0, 1] and multiplies them by this; the graph's timesteps are those of the schedule


class FluxTransformer2D(TransformerFamily):
    """Conditioning: text tokens, pooled prompt, positions of image and text tokens, and in dev the guidance scale as an embedded input.

    Positions have a batch dimension, as all inputs do; the first sample's are used for the whole batch, which has one size.

    Source: Black Forest Labs' FLUX.1; Su et al., RoFormer, arXiv 2104.09864 (rotary positions).
    """

    class_name = "FluxTransformer2DModel"
    model_class = FluxTransformer2DModel
    flow = True
    signature = (
        "hidden_states",
        TOKENS,
        POOLED,
        "timestep",
        IMAGE_IDS,
        TEXT_IDS,
        SCALE_INPUT,
        "joint_attention_kwargs",
        "controlnet_block_samples",
        "controlnet_single_block_samples",
        "return_dict",
        "controlnet_blocks_repeat",
    )
    refused: ClassVar[Mapping[str, str]] = {
        "joint_attention_kwargs": ADAPTER,
        "controlnet_block_samples": CONTROLNET,
        "controlnet_single_block_samples": CONTROLNET,
        "controlnet_blocks_repeat": CONTROLNET,
    }
    rules = (
        ends("x_embedder", "proj_out"),
        PlacementRule("^context_embedder$", "w8a8", "every block attends to its output"),
        EMBEDDER,
        MODULATION,
    )
    text_inputs = (TOKENS, POOLED)

    def build(self, config: Config) -> nn.Module:
        # The class of diffusers has no sample_size, and warns each time it is built with one.
        model: Any = super().build({key: value for key, value in config.items() if key != SIZE})
        if config.get(SIZE) is not None:
            model.register_to_config(**{SIZE: config[SIZE]})
        model.pos_embed = Rotary(model.pos_embed)
        built: nn.Module = model
        return built

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        axes = len(config["axes_dims_rope"])
        inputs = (
            ModelInput(SAMPLE, "float", ("batch", IMAGE_TOKENS, int(config["in_channels"]))),
            TIMESTEP,
            ModelInput(TOKENS, "float", ("batch", "tokens", int(config["joint_attention_dim"]))),
            ModelInput(POOLED, "float", ("batch", int(config["pooled_projection_dim"]))),
            ModelInput(IMAGE_IDS, "float32", ("batch", IMAGE_TOKENS, axes)),
            ModelInput(TEXT_IDS, "float32", ("batch", "tokens", axes)),
        )
        return (*inputs, ModelInput(SCALE_INPUT, "float32", ("batch",))) if config["guidance_embeds"] else inputs

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        output: Tensor = model(
            inputs[SAMPLE],
            encoder_hidden_states=inputs[TOKENS],
            pooled_projections=inputs[POOLED],
            timestep=inputs[TIMESTEP.name] / TIMESTEPS,
            img_ids=inputs[IMAGE_IDS][0],
            txt_ids=inputs[TEXT_IDS][0],
            guidance=inputs.get(SCALE_INPUT),
            return_dict=False,
        )[0]
        return output

    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        arguments = super().bind(config, args, kwargs)
        arguments[TIMESTEP.name] = timestep_tensor(arguments[TIMESTEP.name]) * TIMESTEPS
        sample = arguments[SAMPLE]
        for name in (IMAGE_IDS, TEXT_IDS):
            ids = arguments[name]
            both = (
                isinstance(sample, Tensor) and isinstance(ids, Tensor) and is_dense(sample) and is_dense(ids)
            )  # else the engine refuses them
            if both and sample.ndim and ids.ndim == 2:
                arguments[name] = ids.expand(len(sample), -1, -1)
        return arguments

    def sample_size(self, config: Config) -> tuple[int, int]:
        """In latents, as in other models' configs; FLUX's published config has no `sample_size`."""
        return super().sample_size({SIZE: config.get(SIZE) or LATENT_SIZE})

    def sample_shape(self, config: Config) -> tuple[int, ...]:
        height, width = self._grid(config)
        return height * width, int(config["in_channels"])

    def latents(self, config: Config, sample: Tensor) -> Tensor:
        height, width = self._grid(config)
        channels = int(config["in_channels"]) // PACKED**2
        grid = sample.reshape(-1, height, width, channels, PACKED, PACKED).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(-1, channels, height * PACKED, width * PACKED)

    def size_multiple(self, config: Config) -> int:
        return PACKED

    def sizes(self, config: Config) -> dict[str, int]:
        return super().sizes(config) | {"tokens": TEXT_TOKENS}

    def sigmas(self, steps: int) -> tuple[float, ...] | None:
        """Evenly spaced from 1 to 1 / steps; the schedulers' default ends close to 0.

        Source: diffusers' FluxPipeline.
        """
        return tuple(1 - step / steps for step in range(steps))

    def attributes(self, config: Config) -> dict[str, Any]:
        return {"cache_context": _cache_context}

    def other_embedding_inputs(self, config: Config) -> str | None:
        return "the pooled prompt" + (" with the guidance scale" if config["guidance_embeds"] else "")

    def guidance(self, config: Config) -> Guidance:
        return Guidance("embedded", SCALE) if config["guidance_embeds"] else Guidance("none")

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Tokens and pooled prompt of unit variance; positions of the model's sample size."""
        height, width = self._grid(config)
        positions = torch.zeros(height, width, len(config["axes_dims_rope"]))
        positions[..., 1] = torch.arange(height)[:, None]
        positions[..., 2] = torch.arange(width)[None]
        drawn = {
            TOKENS: torch.randn(batch, TEXT_TOKENS, int(config["joint_attention_dim"]), generator=generator),
            POOLED: torch.randn(batch, int(config["pooled_projection_dim"]), generator=generator),
            IMAGE_IDS: positions.reshape(1, height * width, -1).repeat(batch, 1, 1),
            TEXT_IDS: torch.zeros(batch, TEXT_TOKENS, positions.shape[-1]),
        }
        return drawn | ({SCALE_INPUT: torch.full((batch,), SCALE)} if config["guidance_embeds"] else {})

    def published_lora(self, config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return from_original_flux(tensors)

    def encode_prompts(self, config: Config, pipeline: Any, prompts: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        conditional, pooled, _ = pipeline.encode_prompt(list(prompts), None, device=torch.device("cpu"), num_images_per_prompt=1)
        return {TOKENS: conditional, POOLED: pooled}, {}

    def _grid(self, config: Config) -> tuple[int, int]:
        """Height and width in tokens."""
        height, width = self.sample_size(config)
        return height // PACKED, width // PACKED


class Rotary(nn.Module):
    """FLUX's rotary positions in float32; diffusers computes them in float64, which several engines do not support.

    Angles are at most a position, which is below 1000, so that the error of float32 is less than 1e-4 radians.
    """

    def __init__(self, embed: Any) -> None:  # diffusers' FluxPosEmbed
        super().__init__()
        self.theta = float(embed.theta)
        self.dims = tuple(int(dim) for dim in embed.axes_dim)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [L, axes]: float32 [L, sum of dims], each value repeated twice."""
        angles = [ids[:, axis : axis + 1].float() * self._frequencies(dim, ids.device) for axis, dim in enumerate(self.dims)]
        joined = torch.cat(angles, dim=-1)
        return joined.cos(), joined.sin()

    def _frequencies(self, dim: int, device: torch.device) -> Tensor:
        return torch.tensor([self.theta ** (-2 * (k // 2) / dim) for k in range(dim)], dtype=torch.float32, device=device)


def _cache_context(name: str) -> contextlib.AbstractContextManager[None]:
    """No operation: diffusers marks the conditional and unconditional pass for caches between blocks, which an engine does not have."""
    return contextlib.nullcontext()


FAMILY = FluxTransformer2D()
