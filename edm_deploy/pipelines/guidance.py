"""What a denoiser is told beside the sample and the timestep, drawn without data, with and without: the two halves of classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edm_deploy.errors import InputError
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Family
from edm_deploy.network.graph_names import SCALE_INPUT

EXTRA_CHANNELS = "extra_channels"  # among the conditioning: further channels of the input `sample`, mask and masked image


@dataclass(frozen=True)
class Conditioning:
    """What the samples of a batch are told.

    Attributes:
        conditional: [B, ...] by name: graph inputs beyond sample and timestep, and `extra_channels`.
        unconditional: [1, ...] by name: what replaces some of `conditional` in the unconditional half. Empty where there is no such half.
        scale: Of classifier-free guidance.
    """

    conditional: Mapping[str, Tensor] = field(default_factory=dict)
    unconditional: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether a batch goes in twice."""
        return bool(self.unconditional) and self.scale != 1.0

    def inputs(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """Graph inputs by name.

        Args:
            sample: float [B, ...], as the scheduler walks it.
            timestep: float32 [B].

        Returns:
            [B, ...] each; [2 B, ...] where guided, the unconditional half first, as in diffusers' pipelines.
        """
        given = dict(self.conditional)
        if EXTRA_CHANNELS in given:
            sample = torch.cat([sample, given.pop(EXTRA_CHANNELS)], dim=1)
        inputs = {SAMPLE: sample, TIMESTEP.name: timestep} | given
        if not self.guided:
            return inputs
        return {name: torch.cat([self._unconditional(name, value), value]) for name, value in inputs.items()}

    def of_members(self, members: Tensor) -> Conditioning:
        """What some samples of the batch are told: int64 [b], their indices."""
        return replace(self, conditional={name: value[members] for name, value in self.conditional.items()})

    def combine(self, prediction: Tensor) -> Tensor:
        """The guided prediction u + scale (c - u), [B, ...], of what `inputs` led to.

        Source: Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598, equation 6, with the scale as diffusers counts it.
        """
        if not self.guided:
            return prediction
        without, given = prediction.chunk(2)
        return without + self.scale * (given - without)

    def _unconditional(self, name: str, value: Tensor) -> Tensor:
        return self.unconditional[name].to(value).expand_as(value) if name in self.unconditional else value


class Conditioner:
    """Draws conditioning without data: labels and masks at random, prompts from a list that was encoded once.

    Args:
        family: Of the model.
        config: Likewise.
        scale: Of the guidance; None is the family's. 1 is off.
        encoded: Inputs by name for a pool to draw from, [P, ...] each; what is not in it is drawn at random.
        unconditional: What stands for no conditioning, [1, ...] by name; None takes the family's.
        origin: Where `encoded` comes from, for the record.

    Raises:
        InputError: A scale for a model that cannot be guided.
    """

    def __init__(
        self,
        family: Family,
        config: Config,
        *,
        scale: float | None = None,
        encoded: Mapping[str, Tensor] | None = None,
        unconditional: Mapping[str, Tensor] | None = None,
        origin: str = "drawn at random",
    ) -> None:
        guidance = family.guidance(config)
        if guidance.kind == "none" and scale not in (None, 1.0):
            raise InputError(f"guidance is {scale}, but {family.class_name} is not guided. Leave guidance out.")
        self.family, self.config, self.kind = family, config, guidance.kind
        self.scale = guidance.scale if scale is None else scale
        self.encoded = dict(encoded or {})
        self.origin = origin
        self.unconditional: dict[str, Tensor] = {}
        if self.kind == "classifier-free" and self.scale != 1.0:
            fixed = torch.Generator().manual_seed(0)  # a model knows one "nothing", whatever the run's seed
            self.unconditional = dict(family.unconditional(config, fixed) if unconditional is None else unconditional)

    def draw(self, batch: int, generator: torch.Generator, *, in_turn: bool = False) -> dict[str, Tensor]:
        """What `batch` samples are told, [B, ...] by name, on the CPU; from a pool at random, or one entry after another."""
        given = self.family.random_conditioning(self.config, batch, generator)
        if self.encoded:
            count = len(next(iter(self.encoded.values())))
            chosen = torch.arange(batch) % count if in_turn else torch.randint(count, (batch,), generator=generator)
            given |= {name: value[chosen] for name, value in self.encoded.items()}
        if self.kind == "embedded" and SCALE_INPUT in given:
            given[SCALE_INPUT] = torch.full_like(given[SCALE_INPUT], self.scale)
        beside = self.family.extra_channels(self.config, batch, generator)
        return given if beside is None else given | {EXTRA_CHANNELS: beside}

    def of(self, given: Mapping[str, Tensor]) -> Conditioning:
        """What was drawn, with its unconditional half."""
        classifier_free = self.kind == "classifier-free"
        return Conditioning(given, self.unconditional, self.scale if classifier_free else 1.0)
