"""UNet2DModel: pixel-space denoisers (DDPM, DDIM and their kin), unconditional or class-conditional."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from diffusers import UNet2DModel
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch import Tensor, nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.models._unet import UNetFamily
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, ModelInput

LABELS = "class_labels"


class UNet2D(UNetFamily):
    """Models indexed by the timestep of a training schedule. A label is an index, an embedding, or no input at all."""

    class_name = "UNet2DModel"
    model_class = UNet2DModel
    output_class = UNet2DOutput
    signature = (SAMPLE, "timestep", LABELS, "return_dict")

    def build(self, config: Config) -> nn.Module:
        if config.get("time_embedding_type", "positional") == "fourier":
            raise UnsupportedError(
                "UNet2DModel with time_embedding_type 'fourier' is indexed by noise level, not by timestep; "
                "activation tables need a model with integer timesteps ('positional' or 'learned')."
            )
        full = self.full_config(config)
        if full["in_channels"] != full["out_channels"]:
            raise UnsupportedError(
                f"UNet2DModel with in_channels={full['in_channels']} and out_channels={full['out_channels']}: expected equal numbers. A scheduler "
                "steps a sample by a prediction of its shape; neither conditioning in extra channels nor a learned variance is supported."
            )
        return super().build(config)

    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        sample = ModelInput(SAMPLE, "float", ("batch", int(config["in_channels"]), "height", "width"))
        match _label_kind(config):
            case "none":
                return sample, TIMESTEP
            case "identity":
                width = config.get("time_embedding_dim") or 4 * config["block_out_channels"][0]
                return sample, TIMESTEP, ModelInput(LABELS, "float", ("batch", width))
            case _:
                return sample, TIMESTEP, ModelInput(LABELS, "int64", ("batch",))

    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        timestep = inputs[TIMESTEP.name]
        if getattr(model.config, "time_embedding_type", None) == "learned":
            timestep = timestep.round().long()
        prediction: Tensor = model(inputs[SAMPLE], timestep, class_labels=inputs.get(LABELS), return_dict=False)[0]
        return prediction

    def classes(self, config: Config) -> int | None:
        return None if _label_kind(config) in ("none", "identity") else int(config.get("num_class_embeds") or 1000)

    def labels(self, config: Config) -> int | None:
        return self.classes(config) if _label_kind(config) == "embedding" else None  # one of kind `timestep` is a number, as a timestep is

    def embedded_timesteps(self, config: Config) -> int | None:
        return int(config["num_train_timesteps"]) if config.get("time_embedding_type") == "learned" else None

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        match _label_kind(config):
            case "none":
                return {}
            case "identity":
                return {LABELS: torch.randn(batch, int(self.inputs(config)[2].dims[1]), generator=generator)}
            case _:
                return {LABELS: torch.randint(0, self.classes(config) or 1, (batch,), generator=generator)}


def _label_kind(config: Config) -> str:
    """The kind of label input: `none`, `identity` (an embedding), `timestep` or `embedding` (an index)."""
    kind = config.get("class_embed_type")
    if kind is None:
        return "embedding" if config.get("num_class_embeds") is not None else "none"
    return str(kind)


FAMILY = UNet2D()
