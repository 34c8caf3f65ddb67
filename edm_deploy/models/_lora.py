"""Names of LoRA tensors that trainers took from other implementations of a network, converted by diffusers to its own names."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.loaders.lora_conversion_utils import _convert_unet_lora_key, _maybe_map_sgm_blocks_to_diffusers
from torch import Tensor

from edm_deploy.errors import InputError, first_line
from edm_deploy.network.family import Config

KOHYA = "lora_unet_"
ORIGINAL_UNET = ("input_blocks", "middle_block", "output_blocks", "time_embed_", "label_emb")  # of the CompVis and Stability UNet
ORIGINAL_FLUX = ("double_blocks", "single_blocks")  # of Black Forest Labs' code
ENDING = ".lora_down.weight"


def from_original_unet(config: Config, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a UNet's LoRA by diffusers' names, where their names are kohya's of the original UNet; LoHa and LoKr factors too.

    Raises:
        InputError: diffusers cannot map a name.
    """
    named = dict(tensors)
    ours = {name for name in named if name.startswith(KOHYA)}
    if not any(part in name for name in ours for part in ORIGINAL_UNET):
        return named
    try:
        mapped = _maybe_map_sgm_blocks_to_diffusers({name: named[name] for name in ours}, SimpleNamespace(**config))
    except (ValueError, KeyError, IndexError) as err:
        raise InputError(
            f"The LoRA has names that diffusers cannot map to this UNet: {first_line(err)}. Choose a LoRA of this model."
        ) from err
    others = {name: value for name, value in named.items() if name not in ours}
    return others | {_diffusers_name(name): value for name, value in mapped.items()}


def _diffusers_name(name: str) -> str:
    """`lora_unet_down_blocks_1_resnets_0_in_layers_2.alpha` as `down_blocks.1.resnets.0.conv1.alpha`."""
    layer, _, ending = name.partition(".")
    converted = _convert_unet_lora_key(layer + ENDING)
    return f"{converted.removesuffix('.lora.down.weight').removesuffix('_lora.down.weight')}.{ending}"


def from_original_flux(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a FLUX LoRA by diffusers' names, where it has the layers of the original code (kohya, XLabs, fal), which joins q, k and v.

    Raises:
        InputError: diffusers cannot convert it.
    """
    if not any(part in name for name in tensors for part in ORIGINAL_FLUX):
        return dict(tensors)
    try:
        converted: dict[str, Tensor] = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))
    except (ValueError, KeyError, RuntimeError) as err:
        raise InputError(f"diffusers cannot convert this FLUX LoRA: {first_line(err)}. Choose another file.") from err
    return converted
