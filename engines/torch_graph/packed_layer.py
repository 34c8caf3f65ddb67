"""One quantized layer in the kernels' format: packed for an engine's file, and read back with the derived tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.errors import ArtifactError
from edm_deploy.numerics.activation_table import reciprocal
from edm_deploy.numerics.codes import dequantize_weight
from edm_deploy.numerics.kernel_layout import CodeFormat, bits_of, pack_weight, unpack_codes, weight_sum, zero_codes


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """Tensors of one quantized layer on one device. Names and layouts as in `cuda/params.h`.

    Attributes:
        kind: Code format of the kernel that computes it; None where none does.
        weight: uint8 [K, R * S, Cb], or float [K, ...] dequantized where no kernel computes it.
        weight_scale: float32 [K].
        weight_sum: int32 [K].
        bias: float32 [K] or None.
        act_scale, inv_scale: float32 [rows]; None, as the next three, where only the weight is quantized.
        qmin, qmax: int32 [rows].
        zero: uint8 [rows, 16]; None where no kernel computes it.
    """

    kind: CodeFormat | None
    weight: Tensor
    weight_scale: Tensor
    weight_sum: Tensor | None = None
    bias: Tensor | None = None
    act_scale: Tensor | None = None
    inv_scale: Tensor | None = None
    qmin: Tensor | None = None
    qmax: Tensor | None = None
    zero: Tensor | None = None

    def quantizes_like(self, other: PackedLayer) -> bool:
        """Whether both quantize a value to the same stored codes."""
        pairs = ((self.inv_scale, other.inv_scale), (self.qmin, other.qmin), (self.qmax, other.qmax))
        return self.kind == other.kind and all(a is not None and b is not None and torch.equal(a, b) for a, b in pairs)


def tensors_from_layer(name: str, layer: QuantizedLayer, kind: CodeFormat | None) -> dict[str, Tensor]:
    """The tensors of one layer in an engine's file, by name: `weight` packed for `kind` (int8 codes where it is None), scales and bounds."""
    tensors = {
        "weight": layer.codes if kind is None else pack_weight(layer.codes, bits_of(kind)),
        "weight_scale": layer.weight_scale,
    }
    if kind is not None:
        tensors["weight_sum"] = weight_sum(layer.codes)
    if layer.activation is not None:
        tensors |= {"act_scale": layer.activation.scale, "act_qmin": layer.activation.qmin, "act_qmax": layer.activation.qmax}
    return {tensor_name(name, leaf): value.contiguous() for leaf, value in tensors.items()}


def layer_from_tensors(
    name: str,
    tensors: Mapping[str, Tensor],
    *,
    packed: CodeFormat | None,
    kind: CodeFormat | None,
    channels: int,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> PackedLayer:
    """One layer of an engine's file: the inverse of `tensors_from_layer`, with the tensors derived from its own.

    Args:
        name: Name of the layer.
        tensors: The tensors of all layers, on the device that the layer will run on.
        packed: Format that the weight was packed for.
        kind: Format of the kernels that will run it; `s8` also runs weights packed in 4 bits, widened.
        channels: Input channels of a filter.
        bias: float32 [K] or None.
        dtype: Floating-point type of a weight that no kernel reads.

    Raises:
        ArtifactError: A tensor is missing.
    """

    def tensor(leaf: str) -> Tensor:
        if (found := tensors.get(tensor_name(name, leaf))) is None:
            raise ArtifactError(f"Site {name!r}: the engine holds no {leaf}. Build it again.")
        return found

    weight, weight_scale = tensor("weight"), tensor("weight_scale")
    table = {}
    if tensor_name(name, "act_scale") in tensors:
        table = _table(tensor("act_scale"), tensor("act_qmin").int(), tensor("act_qmax").int(), kind)
    if packed is None or kind is None:
        return PackedLayer(
            kind=None, weight=dequantize_weight(weight, weight_scale).to(dtype), weight_scale=weight_scale, bias=bias, **table
        )
    if bits_of(packed) != bits_of(kind):
        weight = widened(weight, channels)
    return PackedLayer(kind=kind, weight=weight, weight_scale=weight_scale, weight_sum=tensor("weight_sum"), bias=bias, **table)


def tensor_name(layer: str, leaf: str) -> str:
    """Name of one tensor of a layer, in an engine's file and in a rewritten graph."""
    return f"sites.{layer}.{leaf}"


def _table(scale: Tensor, qmin: Tensor, qmax: Tensor, kind: CodeFormat | None) -> dict[str, Tensor]:
    table = {"act_scale": scale, "inv_scale": reciprocal(scale), "qmin": qmin, "qmax": qmax}
    return table if kind is None else table | {"zero": zero_codes(qmin, bits_of(kind), unsigned=kind == "u4")}


def widened(weight: Tensor, channels: int) -> Tensor:
    """Repack a weight of 4 bits in 8 bits, with the same codes; both are uint8 [K, R * S, Cb]."""
    codes = unpack_codes(weight, 4, channels=channels)  # [K, R * S, C]
    return pack_weight(codes.transpose(1, 2).unsqueeze(-1), 8)


def integers(codes: Tensor, kind: CodeFormat | None, qmin: Tensor, like: Tensor) -> Tensor:
    """Unpack stored codes to integers, in the shape of the layer's input.

    Args:
        codes: uint8 [B, H, W, Cb] of `kind`; or integers where it is None.
        kind: Format of the codes.
        qmin: integers [B], each sample's lowest code; `u4` stores code - qmin.
        like: [B, C, H, W], or [B, ..., C] of a Linear.
    """
    if kind is None:
        return codes.reshape(like.shape)
    is_map = like.ndim == 4 and tuple(codes.shape[1:3]) == tuple(like.shape[2:])
    channels = like.shape[1] if is_map else like.shape[-1]
    values = unpack_codes(codes, bits_of(kind), unsigned=kind == "u4", channels=channels)
    if kind == "u4":
        values = values + qmin.to(torch.int8)[:, None, None, None]
    return values.permute(0, 3, 1, 2) if is_map else values.reshape(like.shape)
