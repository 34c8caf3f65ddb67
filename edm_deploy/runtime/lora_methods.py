"""LoRA on an opened engine: the methods of the drop-in, and those that diffusers' pipelines call on their denoiser."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from edm_deploy.adapters.lora import Lora
from edm_deploy.adapters.lora_file import by_component, scaling_of
from edm_deploy.adapters.read_lora import LoraTarget, lora_from_diffusers, read_lora
from edm_deploy.adapters.site_weights import BranchTarget
from edm_deploy.adapters.slots import LoadedAdapter, SlotState, packed
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.network.family import Family
from edm_deploy.network.restructure import NetworkRewrite
from edm_deploy.runtime.capabilities import CAPABILITIES
from edm_deploy.runtime.manifest import Manifest

log = logging.getLogger(__name__)

Weight = float | Sequence[float] | Tensor  # of an adapter: one number, or one for each sample
LARGEST_WEIGHT = 1e4


class LoraMethods:
    """The adapters of an engine. Mixed into EngineDenoiser; changes are atomic: a call that runs keeps the adapters that it began with."""

    manifest: Manifest
    family: Family

    @property
    def device(self) -> torch.device:
        """Device that inputs must be on."""
        raise NotImplementedError

    def _no_adapters(self, factors: Mapping[str, Tensor] | None) -> SlotState:
        """The state of an engine without adapters; `factors` are those of its branches."""
        self._lora_lock = threading.Lock()
        declared = self.manifest.adapters
        if declared is None:
            return SlotState((), {})
        self._branches = BranchTarget(declared, NetworkRewrite.from_json(self.manifest.structure), factors or {})
        self._zeros = declared.zeros(self.manifest.torch_dtype, self.device)
        return SlotState((), self._zeros)

    def _state(self) -> SlotState:
        raise NotImplementedError

    def _set_state(self, state: SlotState) -> None:
        raise NotImplementedError

    def load_lora(self, source: str | Path | Mapping[str, Tensor], *, weight: Weight = 1.0, name: str | None = None) -> str:
        """Load a LoRA in addition to those that are loaded. The engine is not rebuilt.

        Args:
            source: A safetensors file or a folder with one, of diffusers, PEFT or kohya; or its tensors by name. LoHa and LoKr are approximated.
            weight: Its strength; one number, or one for each sample of a batch. 0 switches it off.
            name: Its name; None takes `default_0`, `default_1`, ...

        Returns:
            The name.

        Raises:
            ArtifactError: The file is missing or damaged.
            InputError: The engine was built without rank slots or has too few, or the LoRA is not one of this model; see `read_lora`.
        """
        return self._add(read_lora(source, self._target()), weight, name)

    def set_adapters(self, adapter_names: str | Sequence[str], weights: Any = None) -> None:
        """Set the weights of loaded adapters; those that are not named are switched off.

        Args:
            adapter_names: One name or several.
            weights: None is 1. With one name: a number, or one for each sample. With several: one entry for each, a number or one for each sample.

        Raises:
            InputError: A name is not loaded, or the weights are not numbers, or not as many as the names.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if isinstance(adapter_names, str) or weights is None or isinstance(weights, float | int):
            given = [weights] * len(names)
        else:
            given = list(weights)
        if len(given) != len(names):
            raise InputError(f"{len(given)} weights for {len(names)} adapters, expected one entry for each.")
        with self._lora_lock:
            state = self._state()
            for name in names:
                state.named(name)
            self._set_state(state.weighted({name: weight_tensor(value) for name, value in zip(names, given, strict=True)}))

    def unload_lora(self, name: str | None = None) -> None:
        """Remove one adapter, or all. Without adapters the engine computes bit for bit what it did before any was loaded.

        Raises:
            InputError: It is not loaded.
        """
        with self._lora_lock:
            state = self._state()
            kept = () if name is None else tuple(each for each in state.adapters if each is not state.named(name))
            self._repack(kept, enabled=state.enabled or not kept)

    def _add(self, lora: Lora, weight: Weight, name: str | None) -> str:
        for note in lora.notes:
            log.warning("%s: %s", lora.name, note)
        sites = self._branches.site_weights(lora)
        with self._lora_lock:
            state = self._state()
            taken = {adapter.name for adapter in state.adapters}
            if name in taken:
                raise InputError(f"An adapter {name!r} is loaded already. Choose another name, or unload it first.")
            name = name or next(label for label in (f"default_{number}" for number in range(len(taken) + 1)) if label not in taken)
            self._repack((*state.adapters, LoadedAdapter(name, lora.rank, sites, weight_tensor(weight))), enabled=state.enabled)
        return name

    def _repack(self, adapters: tuple[LoadedAdapter, ...], *, enabled: bool) -> None:
        declared = self.manifest.adapters
        if declared is None:
            return
        weights = packed(adapters, declared, self.manifest.torch_dtype, self.device) if adapters else self._zeros
        self._set_state(SlotState(adapters, weights, enabled))

    def _target(self) -> LoraTarget:
        declared = self.manifest.adapters
        if declared is None:
            target = CAPABILITIES.get(self.manifest.backend or "")
            remedy = "build it again with build-engine" if target and target.packs_weights else "export the graph again with export"
            raise InputError(f"This engine was built without rank slots for adapters. To load a LoRA, {remedy} --lora-rank 64.")
        return LoraTarget(self.family, self.manifest.config, max(1, declared.rank - self._state().used))

    # What follows has the signatures of diffusers' PeftAdapterMixin, which its pipelines call on their denoiser.

    def load_lora_adapter(
        self, pretrained_model_name_or_path_or_dict: Any, prefix: str | None = "transformer", hotswap: bool = False, **kwargs: Any
    ) -> None:
        """As diffusers' `load_lora_adapter`: load an adapter from a state dict, or from a path as `load_lora` does.

        Raises:
            InputError, ArtifactError: As `load_lora`.
            UnsupportedError: `hotswap`.
        """
        if hotswap:
            raise UnsupportedError("An engine takes adapters without hotswap. Unload the old adapter and load the new one.")
        name = kwargs.get("adapter_name")
        content = pretrained_model_name_or_path_or_dict
        if not isinstance(content, Mapping):
            path = Path(content) / kwargs["weight_name"] if kwargs.get("weight_name") else content
            self.load_lora(path, name=name)
            return
        start = f"{prefix}." if prefix else ""
        tensors = {key.removeprefix(start): value for key, value in content.items() if key.startswith(start)}
        if not tensors:
            return  # a LoRA of other components only
        alphas = {key.removeprefix(start): value for key, value in (kwargs.get("network_alphas") or {}).items() if key.startswith(start)}
        configs = by_component(kwargs.get("metadata") or {})
        scaling = {start: scaling_of(configs[start], "The LoRA")} if start in configs else {}
        self._add(lora_from_diffusers(tensors, alphas, scaling, self._target()), 1.0, name)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters by name; raises InputError where one is not loaded."""
        for name in [adapter_names] if isinstance(adapter_names, str) else adapter_names:
            self.unload_lora(name)

    def disable_lora(self) -> None:
        """Switch all adapters off, with their weights kept for `enable_lora`."""
        self._enable(False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._enable(True)

    disable_adapters = disable_lora
    enable_adapters = enable_lora

    def _enable(self, enabled: bool) -> None:
        with self._lora_lock:
            state = self._state()
            self._set_state(SlotState(state.adapters, state.weights, enabled))

    def active_adapters(self) -> list[str]:
        """Names of the adapters whose weight is not 0 for every sample."""
        state = self._state()
        return [adapter.name for adapter in state.adapters if state.enabled and bool((adapter.weight != 0).any())]

    @property
    def peft_config(self) -> dict[str, Any]:
        """The loaded adapters by name, as pipelines list them."""
        return {adapter.name: {"r": adapter.rank} for adapter in self._state().adapters}

    def fuse_lora(self, *_: object, **__: object) -> NoReturn:
        """Raises UnsupportedError: an engine's weights are rounded."""
        raise UnsupportedError(
            "A LoRA cannot be fused into an engine, whose weights are rounded. Leave it loaded, or build with --lora FILE, which adds it for good."
        )


def weight_tensor(value: Any) -> Tensor:
    """The weight of an adapter as float32 [1] or [n]; None is 1.

    Raises:
        InputError: It is neither a number nor a sequence of them, or not finite.
    """
    try:
        weight = torch.as_tensor(1.0 if value is None else value, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as err:
        shown = "weights by block" if isinstance(value, Mapping) else type(value).__name__
        raise InputError(f"An adapter's weight is {shown}, expected a number, or one for each sample.") from err
    if weight.ndim > 1 or weight.numel() == 0:
        raise InputError(f"An adapter's weight has shape {list(weight.shape)}, expected a number, or one for each sample.")
    if not bool((weight.abs() <= LARGEST_WEIGHT).all()):
        raise InputError(f"An adapter's weight is {float(weight.abs().max()):g}, expected a finite number of at most {LARGEST_WEIGHT:g}.")
    return weight.reshape(-1)
