"""From a LoRA of the published network to the weights of an engine's branches: split inputs, and scales that a rewrite moved into a layer.

A branch reads what its site reads. Where that is p * x instead of the published layer's x (a pre-scale), `down` is divided by p; where it is H x (a rotation),
`down` is multiplied by the inverse of H; where the site's output is q * y (it absorbed the pre-scale of the layer after it), `up` is multiplied by q. A segment of a
layer takes its part of the input channels of `down`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from edm_deploy.adapters.lora import LayerUpdate, Lora
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.network.adapter_inputs import AdapterInputs, adapter_inputs
from edm_deploy.network.restructure import PRE_SCALE, PUBLISHED, NetworkRewrite, layer_of
from edm_deploy.network.rotation import rotate_weight

FACTORS_NAME = "lora.safetensors"  # file of an ONNX directory and an engine with the factors of its sites
INPUT, OUTPUT = ".input", ".output"  # endings of their names


def adapters_of(artifact: Artifact, *, rank: int, pattern: str | None = None) -> AdapterInputs:
    """The branches that a graph or an engine of an artifact gets, before anything is built.

    Args:
        artifact: A valid artifact.
        rank: Number of rank slots.
        pattern: Regular expression of published layer names; None is the family's.

    Raises:
        InputError: As `adapter_inputs`.
        UnsupportedError: The artifact does not hold the scales that were folded into its layers.
    """
    refuse_lost_factors(artifact)
    return adapter_inputs(artifact.family_object, artifact.skeleton(), list(artifact.sites), rank=rank, pattern=pattern)


def refuse_lost_factors(artifact: Artifact) -> None:
    """Raises UnsupportedError where an artifact's layers compute on other values than the published ones, and it does not hold the factors between them."""
    folded = str(artifact.provenance.get("folded_pre_scales", "0 of 0")).partition(" ")[0]
    if folded != "0" and not artifact.absorbed:
        raise UnsupportedError(
            f"{folded} pre-scales of this artifact were folded into other layers by a version that did not keep them, and a LoRA needs them. "
            "Make the artifact again, or use it without LoRA."
        )
    rotated = re.search(r"(\d+) of them folded", str(artifact.provenance.get("rotations", "")))
    if rotated and rotated[1] != "0":
        raise UnsupportedError(
            f"{rotated[1]} rotations of this artifact were folded into the projections of attention's values, so that a LoRA of those does not fit. "
            "Quantize with --set rotate=off, or use the artifact without LoRA."
        )


def site_factors(artifact: Artifact, adapters: AdapterInputs) -> dict[str, Tensor]:
    """`<site>.input` float32 [Cin] and `<site>.output` float32 [Cout] of the sites that compute on scaled values."""
    factors = {name: value for name, value in artifact.absorbed.items() if name.rpartition(".")[0] in adapters.layers}
    for site in adapters.layers:
        if (scale := artifact.params.get(f"{site}.{PRE_SCALE}")) is not None:
            factors[f"{site}{INPUT}"] = scale
    return {name: value.float().contiguous() for name, value in factors.items()}


def check_factors(factors: Mapping[str, Tensor], adapters: AdapterInputs) -> None:
    """Raises ArtifactError where an engine's factors are not those of its branches."""
    for name, value in factors.items():
        site, dot, side = name.rpartition(".")
        shape = adapters.layers.get(site)
        if shape is None or dot + side not in (INPUT, OUTPUT):
            raise ArtifactError(f"{FACTORS_NAME} has a tensor {name!r}, which belongs to no adapter branch. Build the engine again.")
        count = shape[1] if dot + side == INPUT else shape[0]
        if value.dtype != torch.float32 or tuple(value.shape) != (count,) or not bool((value.isfinite() & (value != 0)).all()):
            raise ArtifactError(
                f"{FACTORS_NAME}: {name!r} is {value.dtype} {list(value.shape)}, expected float32 [{count}] without zeros. Build the engine again."
            )


@dataclass(frozen=True)
class BranchTarget:
    """The branches of an engine, as far as a LoRA is converted for them.

    Attributes:
        adapters: The branches.
        structure: Rewrites of the published network.
        factors: From `site_factors`.
    """

    adapters: AdapterInputs
    structure: NetworkRewrite = PUBLISHED
    factors: Mapping[str, Tensor] = field(default_factory=dict)

    def site_weights(self, lora: Lora) -> dict[str, LayerUpdate]:
        """A LoRA's weights by site.

        Raises:
            InputError: A layer of the LoRA has no branch, or the LoRA's rank is above the engine's.
        """
        if lora.rank > self.adapters.rank:
            raise InputError(
                f"{lora.name} has rank {lora.rank}; this engine has {self.adapters.rank} rank slots. Export it again with --lora-rank {lora.rank}."
            )
        sites: dict[str, list[str]] = {}
        for site in self.adapters.layers:
            sites.setdefault(layer_of(site), []).append(site)
        if without := [name for name in lora.layers if name not in sites]:
            more = f" and {len(without) - 1} more" if len(without) > 1 else ""
            raise InputError(
                f"{lora.name} changes layer {without[0]!r}{more}, which has no adapter branch in this engine. "
                "Export it again with --lora-layers that matches it (quantized layers only), or choose another LoRA."
            )
        return {
            site: self._of_site(site, part) for name, update in lora.layers.items() for site, part in self._parts(name, update, sites[name])
        }

    def _parts(self, layer: str, update: LayerUpdate, sites: list[str]) -> list[tuple[str, LayerUpdate]]:
        sizes = self.structure.segments.get(layer)
        pieces = [update.down] if sizes is None else torch.split(update.down, list(sizes), dim=1)
        return [(site, LayerUpdate(down, update.up)) for site, down in zip(sites, pieces, strict=True)]

    def _of_site(self, site: str, update: LayerUpdate) -> LayerUpdate:
        down, up = update.down, update.up
        if (scale := self.factors.get(f"{site}{INPUT}")) is not None:
            down = down / scale.reshape(1, -1, *[1] * (down.ndim - 2))
        if (block := self.structure.rotated.get(site)) is not None:
            down = rotate_weight(down, block)  # after the pre-scale, as the input
        if (scale := self.factors.get(f"{site}{OUTPUT}")) is not None:
            up = up * scale[:, None]
        return LayerUpdate(down, up)
