"""The rank slots of an engine: the loaded adapters next to each other, and the weight of each slot for each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from edm_deploy.adapters.lora import LayerUpdate
from edm_deploy.errors import InputError
from edm_deploy.network.adapter_inputs import AdapterInputs, down_input, up_input


@dataclass(frozen=True)
class LoadedAdapter:
    """One adapter in an engine.

    Attributes:
        name: Its name.
        rank: The slots that it takes.
        sites: Its weights by site.
        weight: float32 [1], or [n] with one for each sample; 0 switches it off.
    """

    name: str
    rank: int
    sites: Mapping[str, LayerUpdate]
    weight: Tensor


@dataclass(frozen=True)
class SlotState:
    """What an engine's adapter inputs hold: immutable, so that a call that runs is not affected by a change.

    Attributes:
        adapters: In the order of their slots.
        weights: The graph's weight inputs by name. The same tensors as long as no adapter is loaded or removed.
        enabled: Whether the adapters have an effect.
    """

    adapters: tuple[LoadedAdapter, ...]
    weights: Mapping[str, Tensor]
    enabled: bool = True

    @property
    def used(self) -> int:
        """The number of slots that are taken."""
        return sum(adapter.rank for adapter in self.adapters)

    def named(self, name: str) -> LoadedAdapter:
        """An adapter by name; InputError lists those that are loaded otherwise."""
        for adapter in self.adapters:
            if adapter.name == name:
                return adapter
        known = ", ".join(adapter.name for adapter in self.adapters) or "none"
        raise InputError(f"No adapter {name!r} is loaded; loaded are {known}. Load it with load_lora.")

    def weighted(self, weights: Mapping[str, Tensor]) -> SlotState:
        """The state with other weights of its adapters: those that are not named get 0."""
        zero = torch.zeros(1)
        return replace(self, adapters=tuple(replace(adapter, weight=weights.get(adapter.name, zero)) for adapter in self.adapters))

    def scales(self, batch: int, slots: int) -> Tensor:
        """The weight of each slot for each sample, float32 [batch, slots].

        Weights for n samples repeat where the batch is a multiple of n, as the halves of classifier-free guidance do.

        Raises:
            InputError: An adapter has weights for another number of samples.
        """
        scales = torch.zeros(batch, slots)
        at = 0
        for adapter in self.adapters:
            if batch % len(adapter.weight):
                raise InputError(
                    f"Adapter {adapter.name!r} has weights for {len(adapter.weight)} samples, the batch has {batch}. "
                    "Set one weight, or one for each sample, with set_adapters."
                )
            if self.enabled:
                scales[:, at : at + adapter.rank] = adapter.weight.repeat(batch // len(adapter.weight))[:, None]
            at += adapter.rank
        return scales


def packed(adapters: Sequence[LoadedAdapter], declared: AdapterInputs, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The weight inputs of a graph with adapters in its slots, zero where none is.

    Raises:
        InputError: The adapters need more slots than the graph has, or hold a value that the graph's type cannot.
    """
    total = sum(adapter.rank for adapter in adapters)
    if total > declared.rank:
        ranks = " + ".join(str(adapter.rank) for adapter in adapters)
        raise InputError(
            f"The adapters have ranks {ranks} = {total} together; this engine has {declared.rank} rank slots. "
            f"Unload one, or export again with --lora-rank {total}."
        )
    weights = declared.zeros(dtype, device)
    for site in {site: None for adapter in adapters for site in adapter.sites}:
        down, up = _of_site(site, adapters, weights)
        for name, value in ((down_input(site), down), (up_input(site), up)):
            narrowed = value.to(dtype)
            if not bool(torch.isfinite(narrowed).all()):
                raise InputError(
                    f"A weight of site {site!r} is above {torch.finfo(dtype).max:g}, the largest {dtype}. Export with --dtype fp32."
                )
            weights[name] = narrowed.to(device).contiguous()
    return weights


def _of_site(site: str, adapters: Sequence[LoadedAdapter], weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    down, up = (torch.zeros(weights[label].shape) for label in (down_input(site), up_input(site)))
    at = 0
    for adapter in adapters:
        if (update := adapter.sites.get(site)) is not None:
            down[at : at + update.rank] = update.down
            up[:, at : at + update.rank] = update.up.reshape(len(up), update.rank, *[1] * (up.ndim - 2))
        at += adapter.rank
    return down, up
