"""Input channels: what each of them reaches, and pre-scales that even them out before anything is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import Trajectories
from calibration.recipe import Recipe
from calibration.run.parallel_map import each_in_a_thread
from calibration.student.student import Student
from calibration.student.teacher import Teacher

SAMPLES = 32  # trajectories that the channels are observed on: MPQ-DM's first calibration batch


@dataclass(frozen=True)
class ChannelRanges:
    """What the input channels of a layer reach at each row of its table; `low <= 0 <= high`.

    Attributes:
        low: float32 [R, Cin].
        high: float32 [R, Cin].
    """

    low: Tensor
    high: Tensor

    def magnitude(self) -> Tensor:
        """The largest magnitude of each channel at each row, float32 [R, Cin]."""
        return torch.maximum(-self.low, self.high)

    def amax(self) -> Tensor:
        """The largest magnitude of each channel at any row, float32 [Cin]."""
        return self.magnitude().amax(0)


def scalable(student: Student) -> list[str]:
    """Layers at the recipe's bits whose input can be scaled channel by channel, one for each input: the first of those that are fed the same."""

    def can(name: str) -> bool:
        layer = student.layers[name].layer
        return student.family.placement(name) == "quantize" and (isinstance(layer, nn.Linear) or layer.groups == 1)

    return [
        name for name in student.layers if student.shared_input_layers(name)[0] == name and all(map(can, student.shared_input_layers(name)))
    ]


def stacked_weight(student: Student, name: str) -> Tensor:
    """The float weights of a layer and its siblings, one below the other and with their kernels flat: float32 [sum of Cout, Cin, kernel]."""
    weights = [student.layers[sibling].layer.weight.detach().float() for sibling in student.shared_input_layers(name)]
    return torch.cat([weight.flatten(2) if weight.ndim > 2 else weight[:, :, None] for weight in weights])


@torch.no_grad()
def channel_ranges(student: Student, teacher: Teacher, trajectories: Trajectories, names: list[str]) -> dict[str, ChannelRanges]:
    """The ranges of the input channels of these layers, by name, observed on the float model.

    Args:
        student: Says which table row a timestep has.
        teacher: Leads, and is observed.
        trajectories: A fresh pool. Up to SAMPLES of it are led once through the schedule; then the pool begins anew.
        names: Layers of the teacher.
    """
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            flat = x.flatten(2).transpose(0, 1).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).T
            for values, extreme in zip(found[name], torch.aminmax(flat, dim=1), strict=True):
                values.append(extreme)

        return hook

    handles = [teacher.model.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        for _ in range(trajectories.rows):
            trajectories.next_member = 0
            batch = trajectories.take(min(SAMPLES, trajectories.size))
            trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))
    finally:
        for handle in handles:
            handle.remove()
    trajectories.restart()
    # The schedule descends, table rows ascend.
    return {
        name: ChannelRanges(torch.stack(low[::-1]).clamp(max=0), torch.stack(high[::-1]).clamp(min=0))
        for name, (low, high) in found.items()
    }


def set_pre_scales(student: Student, recipe: Recipe, scales: Mapping[str, Tensor]) -> None:
    """Pre-scale layers and their siblings, and search the scales of the weights that they have then.

    Args:
        student: Its function stays what it was.
        recipe: Searches the weight scales.
        scales: float32 [Cin] by layer: what inputs are multiplied by.
    """
    for name, scale in scales.items():
        student.set_pre_scale(name, scale)
    layers = [student.layers[sibling] for name in scales for sibling in student.shared_input_layers(name)]
    found = each_in_a_thread(lambda layer: recipe.weight_scale(layer.merged_weight(), layer.bits), layers)
    for layer, scale in zip(layers, found, strict=True):
        layer.set_weight_scale(scale)
