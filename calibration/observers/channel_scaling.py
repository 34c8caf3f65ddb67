"""Ranges of input channels, and pre-scales that equalize them before quantization."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.recipe import Recipe, TrainingContext
from calibration.run.parallel_map import parallel_map
from calibration.student.module_outputs import input_hooks
from calibration.student.student import Student
from edm_deploy.network.restructure import published_weight

SAMPLES = 32  # trajectories that channels are observed on: MPQ-DM's first calibration batch


@dataclass(frozen=True)
class ChannelRanges:
    """Minimum and maximum of each input channel of a layer at each row of its table; `low <= 0 <= high`.

    Attributes:
        low: float32 [R, Cin].
        high: float32 [R, Cin].
    """

    low: Tensor
    high: Tensor

    def magnitude(self) -> Tensor:
        """Largest magnitude of each channel at each row, float32 [R, Cin]."""
        return torch.maximum(-self.low, self.high)

    def amax(self) -> Tensor:
        """Largest magnitude of each channel at any row, float32 [Cin]."""
        return self.magnitude().amax(0)


def scalable(student: Student) -> list[str]:
    """Layers at the recipe's bits whose input can be scaled by channel; of layers that receive the same tensor only the first is listed."""

    def is_scalable(name: str) -> bool:
        layer = student.layers[name].layer
        return student.family.placement(name) == "quantize" and (isinstance(layer, nn.Linear) or layer.groups == 1)

    return [
        name
        for name in student.layers
        if student.shared_input_layers(name)[0] == name and all(map(is_scalable, student.shared_input_layers(name)))
    ]


def stacked_weight(student: Student, name: str) -> Tensor:
    """The float weights of all layers that share the input of `name`, concatenated along output channels: float32 [sum of Cout, Cin, kernel]."""
    layers = [student.layers[layer].layer for layer in student.shared_input_layers(name)]
    weights = [published_weight(layer, layer.weight.detach().float()) for layer in layers]
    return torch.cat([weight.flatten(2) if weight.ndim > 2 else weight[:, :, None] for weight in weights])


@torch.no_grad()
def channel_ranges(context: TrainingContext, names: list[str]) -> dict[str, ChannelRanges]:
    """Ranges of the input channels of some layers, by name, observed on the float model.

    Args:
        context: The teacher leads and is observed; up to SAMPLES samples of a new pool pass once through the schedule, then the pool restarts.
        names: Layers of the teacher.
    """
    teacher, trajectories = context.teacher, context.trajectories
    observed: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in names}

    def observe(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().float()
            flat = x.flatten(2).transpose(0, 1).flatten(1) if isinstance(layer, nn.Conv2d) else x.flatten(0, -2).T
            for values, extreme in zip(observed[name], torch.aminmax(flat, dim=1), strict=True):
                values.append(extreme)

        return hook

    with input_hooks((teacher.model.get_submodule(name), observe(name)) for name in names):
        for _ in range(trajectories.rows):
            trajectories.next_index = 0
            batch = trajectories.next_batch(min(SAMPLES, trajectories.size))
            trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))
    trajectories.restart()
    # The schedule is descending, table rows are ascending.
    return {
        name: ChannelRanges(torch.stack(low[::-1]).clamp(max=0), torch.stack(high[::-1]).clamp(min=0))
        for name, (low, high) in observed.items()
    }


def set_pre_scales(student: Student, recipe: Recipe, scales: Mapping[str, Tensor]) -> None:
    """Set pre-scales of layers and of those that share their inputs, and search the weight scales again.

    Args:
        student: Its float function does not change.
        recipe: Searches the weight scales.
        scales: float32 [Cin] by layer: factors of the inputs.
    """
    for name, scale in scales.items():
        student.set_pre_scale(name, scale)
    layers = [student.layers[layer] for name in scales for layer in student.shared_input_layers(name)]
    new_scales = parallel_map(lambda layer: recipe.weight_scale(layer.merged_weight(), layer.bits), layers)
    for layer, scale in zip(layers, new_scales, strict=True):
        layer.set_weight_scale(scale)
