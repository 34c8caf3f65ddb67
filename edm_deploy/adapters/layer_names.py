"""Parse the tensor names of a LoRA: which layer of the published network, and which factor of its update."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from edm_deploy.adapters.lycoris import LOHA, LOKR

# Endings of names, by factor. diffusers' attention processors write `to_q_lora.down`; PEFT may add the adapter's name, `lora_A.default`.
_DOWN = r"(?:\.lora_A(?:\.\w+)?|\.lora_down|[._]lora\.down|\.lora_linear_layer\.down)\.weight"
_UP = r"(?:\.lora_B(?:\.\w+)?|\.lora_up|[._]lora\.up|\.lora_linear_layer\.up)\.weight"
_LYCORIS = "|".join((*LOHA, *LOKR))
_ENDINGS = re.compile(
    rf"^(?P<layer>.+?)(?:(?P<down>{_DOWN})|(?P<up>{_UP})|(?P<mid>\.lora_mid\.weight)|(?P<alpha>\.alpha)|\.(?P<factor>{_LYCORIS})(?:\.\w+)?(?:\.weight)?)$"
)
DORA = re.compile(r"dora_scale|lora_magnitude_vector")
TEXT = re.compile(r"^(text_encoder(_\d)?|lora_te\d?|te\d?)[._]")  # names of text encoders' layers
WRAPPERS = ("base_model.model.", "base_model.", "diffusion_model.", "unet.", "transformer.", "model.")
KOHYA = ("lora_unet_", "lora_transformer_", "lycoris_")


@dataclass
class ParsedNames:
    """A file's tensors by published layer.

    Attributes:
        layers: The factors of each layer's update, by name: `down`, `up`, `mid`, `alpha`, and those of LoHa and LoKr.
        text: Names that belong to text encoders.
        unknown: Names that belong to nothing known.
    """

    layers: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    text: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def parse_names(tensors: Mapping[str, Tensor], published: Iterable[str]) -> ParsedNames:
    """Assign each tensor to a layer of the published network.

    Args:
        tensors: By name, as a trainer or a converter of diffusers named them.
        published: Names of the network's layers.
    """
    names = set(published)
    underscored = {name.replace(".", "_"): name for name in names}
    result = ParsedNames()
    for name, value in tensors.items():
        if TEXT.match(name):
            result.text.append(name)
            continue
        match = _ENDINGS.match(name)
        layer = _layer(match["layer"], names, underscored) if match else None
        if match is None or layer is None:
            result.unknown.append(name)
            continue
        factor = match["factor"] or next(kind for kind in ("down", "up", "mid", "alpha") if match[kind])
        result.layers.setdefault(layer, {})[factor] = value
    return result


def _layer(name: str, names: set[str], underscored: Mapping[str, str]) -> str | None:
    for prefix in KOHYA:
        if name.startswith(prefix):
            return underscored.get(name.removeprefix(prefix))
    candidates = [name]
    for wrapper in WRAPPERS:
        candidates += [candidate.removeprefix(wrapper) for candidate in candidates if candidate.startswith(wrapper)]
    for candidate in candidates:
        plain = candidate.replace(".processor.", ".")
        for form in (plain, f"{plain}.0" if plain.endswith("to_out") else plain):
            if form in names:
                return form
    return None
