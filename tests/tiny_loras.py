"""Random LoRAs of tiny networks, by the names that PEFT, diffusers and kohya give them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

STRENGTH = 0.3  # size of an update relative to a layer of unit gain


def peft_tensors(
    shapes: Mapping[str, tuple[int, ...]], *, rank: int, seed: int = 0, prefix: str = "", strength: float = STRENGTH
) -> dict[str, Tensor]:
    """A LoRA of layers by published name: `<layer>.lora_A.weight` [r, Cin, ...] and `<layer>.lora_B.weight` [Cout, r, ...]."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs, *taps) in shapes.items():
        spread = (inputs * torch.Size(taps).numel()) ** -0.5
        tensors[f"{prefix}{name}.lora_A.weight"] = spread * torch.randn(rank, inputs, *taps, generator=generator)
        tensors[f"{prefix}{name}.lora_B.weight"] = strength * rank**-0.5 * torch.randn(outputs, rank, *[1] * len(taps), generator=generator)
    return tensors


def kohya_tensors(peft: Mapping[str, Tensor], *, alpha: float) -> dict[str, Tensor]:
    """The same LoRA by kohya's names, with its factor alpha / r taken out of `lora_up`."""
    tensors = {}
    for name, value in peft.items():
        layer, _, half = name.removesuffix(".weight").rpartition(".")
        kohya = f"lora_unet_{layer.replace('.', '_')}"
        if half == "lora_A":
            tensors |= {f"{kohya}.lora_down.weight": value, f"{kohya}.alpha": torch.tensor(alpha)}
        else:
            tensors[f"{kohya}.lora_up.weight"] = value * value.shape[1] / alpha
    return tensors
