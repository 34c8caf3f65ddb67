"""What a training's loss may count beside the prediction: the outputs of layers, and how the pixels of a feature map relate to each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from calibration.student.module_outputs import tensors_of


class AuxiliaryLoss(Protocol):
    """A further part of the loss."""

    @property
    def modules(self) -> Sequence[str]:
        """Names of the modules whose outputs it compares."""

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """A scalar, from their outputs by name: [B, ...] each, the teacher's without gradients."""


@dataclass(frozen=True)
class LayerOutputLoss:
    """`weight * sum over layers of mean((y_q - y)^2) / mean(y^2)`: each layer in units of its own output, so that none drowns the others.

    Attributes:
        modules: Names of the layers.
        weight: What it counts.
    """

    modules: Sequence[str]
    weight: float

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """A scalar."""
        parts = []
        for name in self.modules:
            target = teacher[name].float()
            parts.append((student[name].float() - target).square().mean() / target.square().mean().clamp(min=1e-12))
        return self.weight * torch.stack(parts).sum()


@dataclass(frozen=True)
class RelationDistillationLoss:
    """`weight * KL(softmax(S_fp) || softmax(S_q))`, a mean over pixels: which pixels of a feature map are like which.

    Source: Feng et al., MPQ-DM, AAAI 2025, arXiv 2412.11549: relation distillation.

    Attributes:
        module: Name of the module that gives the feature map; the last tensor of several.
        weight: What it counts.
        pixels: As many at most are related with each other; larger maps are averaged over areas, longer sequences over runs.
    """

    module: str
    weight: float
    pixels: int = 256

    @property
    def modules(self) -> Sequence[str]:
        """The one."""
        return (self.module,)

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """A scalar."""
        log_student, log_teacher = (log_relations(pixels_of(outputs[self.module].float(), self.pixels)) for outputs in (student, teacher))
        divergence = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return self.weight * divergence / log_student.shape[:2].numel()


def log_relations(pixels: Tensor) -> Tensor:
    """Logarithm of how each pixel's likeness, the cosine of the features, is shared out over all pixels: float32 [B, N, N] of [B, N, C]."""
    unit = functional.normalize(pixels, dim=2)
    return functional.log_softmax(unit @ unit.transpose(1, 2), dim=2)


def pixels_of(features: Tensor, most: int) -> Tensor:
    """A feature map [B, C, H, W] or a sequence [B, N, C] as float32 [B, at most `most`, C]."""
    if features.ndim == 4:
        side = int(most**0.5)
        size = min(side, features.shape[2]), min(side, features.shape[3])
        return functional.adaptive_avg_pool2d(features, size).flatten(2).transpose(1, 2)
    return functional.adaptive_avg_pool1d(features.transpose(1, 2), min(most, features.shape[1])).transpose(1, 2)


@contextmanager
def capture_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within it every forward pass leaves the outputs of these modules in what it yields, by name."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, tensors_of(output)[-1])

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(keep(name))
            stack.callback(handle.remove)
        yield outputs
