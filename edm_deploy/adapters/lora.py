"""A LoRA in the one form that the rest of the package reads: two matrices for each published layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.errors import InputError


@dataclass(frozen=True)
class LayerUpdate:
    """The update of one layer's weight: `W + up @ down`, reshaped as `W`.

    Attributes:
        down: float32 [r, Cin] or [r, Cin, kh, kw].
        up: float32 [Cout, r]. Holds the factor alpha / r.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        """The rank r."""
        return len(self.down)

    def delta(self) -> Tensor:
        """The update itself, float32 in the shape of the layer's weight."""
        return (self.up @ self.down.flatten(1)).reshape(len(self.up), *self.down.shape[1:])


@dataclass(frozen=True)
class Lora:
    """Updates of a published network by layer name.

    Attributes:
        name: Where it comes from, for messages.
        layers: Updates by the layer's name in the published network.
        notes: What a user should learn about how it was read, one line each.
    """

    name: str
    layers: Mapping[str, LayerUpdate]
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of its layers: the rank slots that it takes."""
        return max((update.rank for update in self.layers.values()), default=0)


def check_lora(lora: Lora, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a LoRA belongs to a network.

    Args:
        lora: With layers of this network.
        shapes: Shape of the weight of each published layer.

    Raises:
        InputError: A layer has weights of other shapes, or that are not finite.
    """
    if not lora.layers:
        raise InputError(
            f"{lora.name} holds no LoRA of the denoiser; expected keys such as 'unet.<layer>.lora_A.weight'. Choose another file."
        )
    for name, update in lora.layers.items():
        outputs, *rest = shapes[name]
        if tuple(update.down.shape[1:]) != tuple(rest) or len(update.up) != outputs:
            found = f"[{len(update.up)}, {', '.join(map(str, update.down.shape[1:]))}]"
            raise InputError(
                f"{lora.name} is for another base model: layer {name!r} has shape {list(shapes[name])}, the LoRA's update of it {found}. "
                "Choose a LoRA that was trained on this model."
            )
        if not bool(torch.isfinite(update.down).all() and torch.isfinite(update.up).all()):
            raise InputError(
                f"{lora.name}: layer {name!r} holds NaN or infinity. The file is damaged or its training diverged; choose another."
            )
