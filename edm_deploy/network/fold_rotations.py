"""Fold rotations exactly into the layers before: attention's result is linear in its values, so their projection can rotate it, head by head.

Source: Ashkboos et al., QuaRot, arXiv 2404.00456, section 4 (the rotation of attention's output, fused into the projection of the values).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from edm_deploy.network.rotation import rotate, rotate_weight


@dataclass(frozen=True)
class AttentionValues:
    """The linear layers around the values of one attention.

    Attributes:
        written_by: Layers that compute values; two where two streams of tokens attend jointly.
        read_by: Layers that read attention's result, one for each stream that has one.
        head: Channels of one head.
    """

    written_by: tuple[str, ...]
    read_by: tuple[str, ...]
    head: int


def attention_values(model: nn.Module) -> list[AttentionValues]:
    """Every attention whose result nothing but linear layers read, in the order of the model; by the names of layers in diffusers' attention modules."""
    found = []
    for name, module in model.named_modules():
        heads, parts = getattr(module, "heads", None), dict(module.named_modules())
        written, read = ([part for part in names if part in parts] for names in (("to_v", "add_v_proj"), ("to_out.0", "to_add_out")))
        linear = [layer for part in (*written, *read) if isinstance(layer := parts[part], nn.Linear)]
        if not isinstance(heads, int) or "to_v" not in written or "to_out.0" not in read or len(linear) < len(written) + len(read):
            continue  # without an own output layer, or with one that is split
        widths = {layer.out_features for layer in linear[: len(written)]} | {layer.in_features for layer in linear[len(written) :]}
        if len(widths) == 1 and (width := widths.pop()) % heads == 0:
            by_name = [tuple(f"{name}.{part}" for part in layers) for layers in (written, read)]
            found.append(AttentionValues(by_name[0], by_name[1], width // heads))
    return found


@torch.no_grad()
def fold_rotations(model: nn.Module, rotated: Mapping[str, int]) -> dict[str, int]:
    """Rotate weights of a float model in place of its activations, where that is exact; its function is unchanged.

    A rotation is folded where every reader of an attention's result is rotated in blocks of one size, which divides the channels of a head.

    Args:
        model: Its layers get new weights, float32; the old tensors are not changed.
        rotated: Size of the blocks by layer, each of which divides the layer's input channels.

    Returns:
        The layers whose input is still to be rotated.
    """
    left = dict(rotated)
    for values in attention_values(model):
        blocks = {rotated.get(name) for name in values.read_by}
        block = blocks.pop()
        if blocks or block is None or values.head % block:
            continue
        for layer in (model.get_submodule(name) for name in values.written_by):
            assert isinstance(layer, nn.Linear)  # as attention_values finds them
            layer.weight = _parameter(rotate(layer.weight.float().t(), block).t().contiguous(), layer.weight)
            if layer.bias is not None:
                layer.bias = _parameter(rotate(layer.bias.float(), block), layer.bias)
        for name in values.read_by:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            layer.weight = _parameter(rotate_weight(layer.weight, block), layer.weight)
            del left[name]
    return left


def _parameter(value: Tensor, old: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=old.requires_grad)
