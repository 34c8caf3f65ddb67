"""Conditioning of a denoiser, drawn without data, and classifier-free guidance with its conditional and unconditional half."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from edm_deploy.errors import InputError
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config, Family
from edm_deploy.network.graph_names import SCALE_INPUT
from edm_deploy.pipelines.sampling import Denoise

EXTRA_CHANNELS = "extra_channels"  # key of the conditioning: channels to concatenate to `sample`, such as mask and masked image


@dataclass(frozen=True)
class Conditioning:
    """The conditioning of a batch of samples.

    Attributes:
        conditional: [B, ...] by name: the graph inputs after sample and timestep, and `extra_channels`.
        unconditional: [1, ...] by name: replacements for some of `conditional` in the unconditional half. Empty without classifier-free guidance.
        scale: Scale of classifier-free guidance.
    """

    conditional: Mapping[str, Tensor] = field(default_factory=dict)
    unconditional: Mapping[str, Tensor] = field(default_factory=dict)
    scale: float = 1.0

    @property
    def guided(self) -> bool:
        """Whether the model runs on both halves, conditional and unconditional."""
        return bool(self.unconditional) and self.scale != 1.0

    def inputs(self, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        """Graph inputs by name.

        Args:
            sample: float [B, ...], the scheduler's sample after input scaling.
            timestep: float32 [B].

        Returns:
            [B, ...] each; where guided [2 B, ...], the unconditional half first, as in diffusers' pipelines.
        """
        conditional = dict(self.conditional)
        if EXTRA_CHANNELS in conditional:
            sample = torch.cat([sample, conditional.pop(EXTRA_CHANNELS)], dim=1)
        inputs = {SAMPLE: sample, TIMESTEP.name: timestep} | conditional
        if not self.guided:
            return inputs
        return {name: torch.cat([self._unconditional(name, value), value]) for name, value in inputs.items()}

    def of_members(self, members: Tensor) -> Conditioning:
        """The conditioning of some samples of the batch, given their indices, int64 [b]."""
        return replace(self, conditional={name: value[members] for name, value in self.conditional.items()})

    def combine(self, prediction: Tensor) -> Tensor:
        """The guided prediction u + scale (c - u), [B, ...], from the model's output on `inputs`.

        Source: Ho and Salimans, Classifier-Free Diffusion Guidance, arXiv 2207.12598, equation 6, with the scale as diffusers counts it.
        """
        if not self.guided:
            return prediction
        unconditional, conditional = prediction.chunk(2)
        return unconditional + self.scale * (conditional - unconditional)

    def denoiser(self, run: Callable[[Mapping[str, Tensor]], Tensor], batch: int) -> Denoise:
        """The guided prediction of a network for all samples of this conditioning.

        Args:
            run: The network: its prediction by graph inputs.
            batch: Samples of one forward pass, whose activations are in memory at once.
        """

        def denoise(sample: Tensor, timestep: Tensor) -> Tensor:
            parts = []
            for members in torch.split(torch.arange(len(sample)), batch):
                part = self.of_members(members)
                parts.append(part.combine(run(part.inputs(sample[members], timestep[members]))))
            return torch.cat(parts)

        return denoise

    def _unconditional(self, name: str, value: Tensor) -> Tensor:
        return self.unconditional[name].to(value).expand_as(value) if name in self.unconditional else value


class Conditioner:
    """Draw conditioning without data: labels and masks at random, prompts from a list that is encoded once.

    Args:
        family: Family of the model.
        config: Config of the model.
        scale: Guidance scale, 1 for no guidance; None is the family's usual scale.
        encoded: A pool of P encoded inputs to draw from, [P, ...] by name; other inputs are drawn at random.
        unconditional: The null conditioning, [1, ...] by name; None is the family's.
        origin: Description of `encoded`, for the artifact's provenance.

    Raises:
        InputError: A guidance scale for a model without guidance.
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
            fixed = torch.Generator().manual_seed(0)  # one null conditioning per model, independent of the run's seed
            self.unconditional = dict(family.unconditional(config, fixed) if unconditional is None else unconditional)

    def draw(self, batch: int, generator: torch.Generator, *, in_turn: bool = False) -> dict[str, Tensor]:
        """Conditioning of `batch` samples, [B, ...] by name, on the CPU; from the pool at random, or in order where `in_turn`."""
        drawn = self.family.random_conditioning(self.config, batch, generator)
        if self.encoded:
            count = len(next(iter(self.encoded.values())))
            chosen = torch.arange(batch) % count if in_turn else torch.randint(count, (batch,), generator=generator)
            drawn |= {name: value[chosen] for name, value in self.encoded.items()}
        if self.kind == "embedded" and SCALE_INPUT in drawn:
            drawn[SCALE_INPUT] = torch.full_like(drawn[SCALE_INPUT], self.scale)
        channels = self.family.extra_channels(self.config, batch, generator)
        return drawn if channels is None else drawn | {EXTRA_CHANNELS: channels}

    def of(self, drawn: Mapping[str, Tensor]) -> Conditioning:
        """Drawn conditioning with its unconditional half and scale."""
        classifier_free = self.kind == "classifier-free"
        return Conditioning(drawn, self.unconditional, self.scale if classifier_free else 1.0)
