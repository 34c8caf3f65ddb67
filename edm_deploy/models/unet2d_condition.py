"""UNet2DConditionModel: latent denoisers with cross-attention (Stable Diffusion 1.x and 2.x shapes; text or label tokens)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.family import SAMPLE, TIMESTEP, Config, ModelInput
from edm_deploy.models._unet import UNetFamily

TOKENS = "encoder_hidden_states"
DEFAULT_TOKENS = 77  # CLIP's text length


class UNet2DCondition(UNetFamily):
    """Models whose only conditioning beside the timestep is `encoder_hidden_states`."""

    class_name = "UNet2DConditionModel"
    model_class = UNet2DConditionModel
    output_class = UNet2DConditionOutput
    signature = (SAMPLE, "timestep", TOKENS)

    def build(self, config: Config) -> nn.Module:
        for key in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
            if config.get(key) is not None:
                raise UnsupportedError(
                    f"UNet2DConditionModel with {key}={config[key]!r} takes conditioning that this family does not carry yet; "
                    "models whose only conditioning is encoder_hidden_states are supported."
                )
        return super().build(config)

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        sample = ModelInput(SAMPLE, "float", ("batch", int(config["in_channels"]), "height", "width"))
        return sample, TIMESTEP, ModelInput(TOKENS, "float", ("batch", "tokens", _token_width(config)))

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        prediction: Tensor = model(inputs[SAMPLE], inputs["timestep"], inputs[TOKENS], return_dict=False)[0]
        return prediction

    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        kwargs = {key: value for key, value in kwargs.items() if not (key == "added_cond_kwargs" and not value)}
        return super().bind(config, args, kwargs)

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {TOKENS: torch.randn(batch, DEFAULT_TOKENS, _token_width(config), generator=generator)}


def _token_width(config: Config) -> int:
    width = config["cross_attention_dim"]
    if not isinstance(width, int):
        raise UnsupportedError(f"cross_attention_dim {width!r} differs by block; expected one number.")
    return width


FAMILY = UNet2DCondition()
