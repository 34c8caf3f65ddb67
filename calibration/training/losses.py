"""Auxiliary losses of a training: errors of layer outputs, and relations between the pixels of a feature map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class LayerOutputLoss:
    """`weight * sum over layers of mean((y_q - y)^2) / mean(y^2)`: normalized by each layer's own output, so that no layer dominates.

    Attributes:
        modules: Names of the layers.
        weight: Weight in the loss.
    """

    modules: Sequence[str]
    weight: float

    def statistics(self, teacher: Mapping[str, Tensor]) -> Tensor:
        """Mean square of each layer's output."""
        return torch.stack([teacher[name].float().square().mean() for name in self.modules])

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], statistics: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        parts = []
        for name, power in zip(self.modules, self.statistics(teacher) if statistics is None else statistics, strict=True):
            parts.append((student[name].float() - teacher[name].float()).square().mean() / power.clamp(min=1e-12))
        return self.weight * torch.stack(parts).sum()


@dataclass(frozen=True)
class RelationDistillationLoss:
    """`weight * KL(softmax(S_fp) || softmax(S_q))`, summed over pixels, where S is the cosine similarity of the pixels of a feature map.

    A mean over the batch, like the error of the prediction, which is summed over its elements: the two are as strong in relation as in the source, which
    sums both over the batch too.

    Source: Feng et al., MPQ-DM, AAAI 2025, arXiv 2412.11549: relation distillation; the reductions from the released code.

    Attributes:
        module: Name of the module whose output, or last output tensor, is the feature map.
        weight: Weight in the loss.
        pixels: Maximum number of pixels; larger maps and longer sequences are average-pooled.
    """

    module: str
    weight: float
    pixels: int = 256

    @property
    def modules(self) -> Sequence[str]:
        """The module, as a tuple."""
        return (self.module,)

    def statistics(self, teacher: Mapping[str, Tensor]) -> Tensor:
        """None."""
        return torch.zeros(0)

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], statistics: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        log_student, log_teacher = (log_relations(pixels_of(outputs[self.module].float(), self.pixels)) for outputs in (student, teacher))
        divergence = functional.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
        return self.weight * divergence / len(log_student)


def log_relations(pixels: Tensor) -> Tensor:
    """Log-softmax over all pixels of each pixel's cosine similarity to them: float32 [B, N, N] of [B, N, C]."""
    unit = functional.normalize(pixels, dim=2)
    return functional.log_softmax(unit @ unit.transpose(1, 2), dim=2)


def pixels_of(features: Tensor, most: int) -> Tensor:
    """A feature map [B, C, H, W] or a sequence [B, N, C] as float32 [B, at most `most`, C]."""
    if features.ndim == 4:
        side = int(most**0.5)
        size = min(side, features.shape[2]), min(side, features.shape[3])
        return functional.adaptive_avg_pool2d(features, size).flatten(2).transpose(1, 2)
    return functional.adaptive_avg_pool1d(features.transpose(1, 2), min(most, features.shape[1])).transpose(1, 2)
