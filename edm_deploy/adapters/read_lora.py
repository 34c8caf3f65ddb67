"""A LoRA of a network from a file, a folder or tensors by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.adapters.layer_names import DORA, parse_names
from edm_deploy.adapters.lora import LayerUpdate, Lora, check_lora
from edm_deploy.adapters.lora_file import LoraFile, LoraScaling, dora_refusal, read_lora_file
from edm_deploy.adapters.lycoris import LOHA, LOKR, low_rank, weight_update
from edm_deploy.errors import InputError
from edm_deploy.network.family import Config, Family
from edm_deploy.network.meta_model import meta_model


@dataclass(frozen=True)
class LoraTarget:
    """The network that a LoRA is read for.

    Attributes:
        family, config: The denoiser.
        rank: Largest rank of an approximation of a LoHa or LoKr.
    """

    family: Family
    config: Config
    rank: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of the weight of each published convolution and linear layer."""
        modules = meta_model(self.family, self.config).named_modules()
        return {name: tuple(layer.weight.shape) for name, layer in modules if isinstance(layer, nn.Conv2d | nn.Linear)}


def read_lora(source: Path | str | Mapping[str, Tensor] | LoraFile, target: LoraTarget) -> Lora:
    """Read a LoRA and check that it belongs to a network.

    LoHa and LoKr are approximated by a LoRA of the target's rank; a note states the error.

    Args:
        source: A safetensors file, a folder with one, or its tensors by name.
        target: The network.

    Raises:
        ArtifactError: The file is missing or damaged.
        InputError: It is a DoRA, has keys that belong to no layer of the network, is for another base model, or holds NaN or infinity.
    """
    file = (
        source if isinstance(source, LoraFile) else LoraFile("The LoRA", source) if isinstance(source, Mapping) else read_lora_file(source)
    )
    if any(DORA.search(name) for name in file.tensors):
        raise dora_refusal(file.name)
    shapes = target.shapes()
    named = target.family.published_lora(target.config, file.tensors)
    parsed = parse_names(named, shapes)
    if parsed.unknown:
        more = f" and {len(parsed.unknown) - 1} more" if len(parsed.unknown) > 1 else ""
        raise InputError(
            f"{file.name} has {sorted(parsed.unknown)[0]!r}{more}, which names no layer of this {target.family.class_name}. "
            "Choose a LoRA that was trained on this model."
        )
    scaling = _scaling(file.scaling, target.family.component)
    layers, errors = dict[str, LayerUpdate](), dict[str, float]()
    for name, content in parsed.layers.items():
        layers[name], error = _update(file.name, name, content, shapes[name], scaling, target.rank)
        if error is not None:
            errors[name] = error
    lora = Lora(file.name, layers, (*_approximated(errors, target.rank), *_ignored(parsed.text)))
    check_lora(lora, shapes)
    return lora


def _scaling(found: Mapping[str, LoraScaling], component: str) -> LoraScaling:
    return next((found[prefix] for prefix in (f"{component}.", "") if prefix in found), LoraScaling())


def _update(
    file: str, name: str, content: Mapping[str, Tensor], shape: tuple[int, ...], scaling: LoraScaling, rank: int
) -> tuple[LayerUpdate, float | None]:
    """The update of one layer; with the error of its approximation, where it is a LoHa or LoKr."""
    factors = {key: value.detach().cpu().float() for key, value in content.items()}
    alpha = factors.pop("alpha", None)
    alpha_value = None if alpha is None else float(alpha)
    if any(key in factors for key in (*LOHA, *LOKR)):
        try:
            delta, found = weight_update(factors, shape)
        except InputError as err:
            raise InputError(f"{file}, layer {name!r}: {err}") from err
        if not bool(torch.isfinite(delta).all()):
            raise InputError(f"{file}: layer {name!r} holds NaN or infinity. The file is damaged or its training diverged; choose another.")
        update, error = low_rank(delta * scaling.factor(name, found, alpha_value), rank)
        return update, error
    if "down" not in factors or "up" not in factors:
        missing = "down (lora_A)" if "up" in factors else "up (lora_B)"
        raise InputError(f"{file}: layer {name!r} has no {missing} weight. The file is incomplete; copy it again.")
    down, up = factors["down"], factors["up"].flatten(1)
    if "mid" in factors:  # a Tucker decomposition: 1x1 down, then kh x kw between the ranks
        down = torch.einsum("ijkl,jc->ickl", factors["mid"], down.flatten(1))
    if up.shape[1] != len(down):
        raise InputError(f"{file}: layer {name!r} has ranks {len(down)} and {up.shape[1]}, expected equal ones. The file is damaged.")
    if down.ndim != len(shape) and down.flatten(1).shape[1] == torch.Size(shape[1:]).numel():
        down = down.reshape(len(down), *shape[1:])  # a 1x1 convolution that was saved as a linear layer, or the reverse
    return LayerUpdate(down, up * scaling.factor(name, len(down), alpha_value)), None


def _approximated(errors: Mapping[str, float], rank: int) -> tuple[str, ...]:
    if not errors:
        return ()
    worst = max(errors, key=lambda name: errors[name])
    return (
        f"{len(errors)} LoHa or LoKr updates became LoRAs of rank {rank} or less by SVD; largest error {errors[worst]:.1%} of the update, in {worst}.",
    )


def _ignored(text: list[str]) -> tuple[str, ...]:
    return (f"{len(text)} tensors of text encoders are ignored, because an engine is a denoiser.",) if text else ()


def lora_from_diffusers(
    tensors: Mapping[str, Tensor], alphas: Mapping[str, Any] | None, scaling: Mapping[str, LoraScaling], target: LoraTarget
) -> Lora:
    """A LoRA from the arguments that a diffusers pipeline passes to its denoiser.

    Args:
        tensors: Its state dict, by diffusers' names, without those of other components.
        alphas: `network_alphas`: alpha by name, of the same prefix.
        scaling: From `metadata`.
        target: The network.

    Raises:
        InputError: As `read_lora`.
    """
    numbers = {name: value if isinstance(value, Tensor) else torch.tensor(float(value)) for name, value in (alphas or {}).items()}
    return read_lora(LoraFile("The LoRA", dict(tensors) | numbers, scaling), target)
