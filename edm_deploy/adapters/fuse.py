"""Add LoRAs for good: to an artifact as the float branches of its layers (`structure.branches`), which every backend computes without inputs; to a float model's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from edm_deploy.adapters.lora import LayerUpdate, Lora
from edm_deploy.adapters.lycoris import low_rank
from edm_deploy.adapters.site_weights import INPUT, OUTPUT, refuse_lost_factors
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import UnsupportedError
from edm_deploy.network.low_rank_branch import BASE, BRANCH, half_values, largest_rank
from edm_deploy.network.restructure import SEGMENT


def with_loras(artifact: Artifact, loras: Sequence[tuple[Lora, float]]) -> Artifact:
    """The artifact with LoRAs in float branches; codes and tables are unchanged.

    A branch that a layer has already grows by the LoRA's rank. Layers that are not quantized get the update in their weight.

    Args:
        artifact: A valid artifact.
        loras: LoRAs of its published network, each with its weight.

    Raises:
        UnsupportedError: The artifact does not hold the scales that were folded into its layers.
    """
    refuse_lost_factors(artifact)
    for lora, weight in loras:
        for layer, update in lora.layers.items():
            artifact = _with_update(artifact, layer, LayerUpdate(update.down, update.up * weight))
    names = [f"{lora.name}:{weight:g}" for lora, weight in loras]
    return replace(artifact, provenance={**artifact.provenance, "loras": [*artifact.provenance.get("loras", []), *names]})


@torch.no_grad()
def merge_loras(model: nn.Module, loras: Sequence[tuple[Lora, float]]) -> None:
    """Add LoRAs, each times its weight, to the weights of a published float network, in place; the layers concerned are float32 afterwards."""
    for lora, weight in loras:
        for name, update in lora.layers.items():
            layer = model.get_submodule(name)
            layer.weight = nn.Parameter(layer.get_parameter("weight").float() + weight * update.delta(), requires_grad=False)


def _with_update(artifact: Artifact, layer: str, update: LayerUpdate) -> Artifact:
    sizes = artifact.structure.segments.get(layer)
    if sizes is None:
        return _with_branch(artifact, layer, update)
    for index, down in enumerate(torch.split(update.down, list(sizes), dim=1)):
        artifact = _with_branch(artifact, f"{layer}.{SEGMENT}{index}", LayerUpdate(down, update.up))
    return artifact


def _with_branch(artifact: Artifact, name: str, update: LayerUpdate) -> Artifact:
    """With an update of one layer, or one segment of a layer."""
    if name not in artifact.sites and f"{name}.{BASE}" not in artifact.sites:
        return _with_weight(artifact, name, update)
    if name not in artifact.structure.branches:
        artifact = _with_base(artifact, name)
    base, down_name, up_name = f"{name}.{BASE}", f"{name}.{BRANCH}.down.weight", f"{name}.{BRANCH}.up.weight"
    down, up = update.down, update.up
    if (scale := artifact.absorbed.get(f"{base}{INPUT}")) is not None:
        down = down / scale.reshape(1, -1, *[1] * (down.ndim - 2))
    if (scale := artifact.absorbed.get(f"{base}{OUTPUT}")) is not None:
        up = up * scale[:, None]
    params = dict(artifact.params)
    if down_name in params:
        down, up = torch.cat([params[down_name], down]), torch.cat([params[up_name].flatten(1), up], dim=1)
    layer = artifact.family_object.sites(artifact.skeleton())[base]
    if len(down) > (most := largest_rank(layer)):
        reduced, _ = low_rank(LayerUpdate(down, up).delta(), most)  # exact: no update has a higher rank
        down, up = reduced.down, reduced.up
    params[down_name], params[up_name] = half_values(down), half_values(up.reshape(*up.shape, *[1] * (down.ndim - 2)))
    branches = {**artifact.structure.branches, name: len(down)}
    return replace(artifact, params=params, structure=replace(artifact.structure, branches=branches))


def _with_base(artifact: Artifact, name: str) -> Artifact:
    """With everything of a layer renamed to its `<name>.base`, whose branch is still to be set."""

    def renamed(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {_moved(key, name): value for key, value in values.items()}

    scaled = tuple(f"{name}.{BASE}" if each == name else each for each in artifact.structure.pre_scaled)
    rotated = {f"{name}.{BASE}" if each == name else each: block for each, block in artifact.structure.rotated.items()}
    structure = replace(artifact.structure, pre_scaled=scaled, rotated=rotated, branches={**artifact.structure.branches, name: 1})
    sites = {f"{name}.{BASE}" if site == name else site: value for site, value in artifact.sites.items()}
    return replace(artifact, sites=sites, params=renamed(artifact.params), absorbed=renamed(artifact.absorbed), structure=structure)


def _moved(key: str, name: str) -> str:
    layer, _, leaf = key.rpartition(".")
    return f"{name}.{BASE}.{leaf}" if layer == name else key


def _with_weight(artifact: Artifact, name: str, update: LayerUpdate) -> Artifact:
    """With an update added to the weight of a layer that is not quantized."""
    weight = f"{name}.weight"
    if artifact.absorbed or weight not in artifact.params:
        raise UnsupportedError(
            f"Layer {name!r} is not quantized and other scales were folded into this artifact, so that no LoRA can be added to it. "
            "Fuse the LoRA into the float model before quantizing."
        )
    return replace(artifact, params={**artifact.params, weight: artifact.params[weight] + update.delta()})
