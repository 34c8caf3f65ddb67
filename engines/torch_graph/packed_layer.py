"""One quantized layer in the kernels' format: packed for an engine's file, and read back with the derived tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.numerics.activation_table import reciprocal
from edm_deploy.numerics.codes import dequantize_weight
from edm_deploy.numerics.kernel_layout import CHUNK, CodeFormat, bits_of, code_bytes, pack_weight, unpack_codes, weight_sum, zero_codes
from engines.common.graph_checks import Expected, check_tensors

LEAVES = ("weight", "weight_scale", "weight_sum", "act_scale", "act_qmin", "act_qmax")  # a layer's tensors in an engine's file


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
    weight_shape: tuple[int, ...],
    bias: Tensor | None,
    dtype: torch.dtype,
) -> PackedLayer:
    """One layer of an engine's file: the inverse of `tensors_from_layer`, with the tensors derived from its own.

    Args:
        name: Name of the layer.
        tensors: The tensors of all layers, on the device that the layer will run on.
        packed: Format that the weight was packed for.
        kind: Format of the kernels that will run it; `s8` also runs weights packed in 4 bits, widened.
        weight_shape: Shape of the layer's float weight.
        bias: float32 [K] or None.
        dtype: Floating-point type of a weight that no kernel reads.

    Raises:
        ArtifactError: A tensor is missing, or has another dtype or shape than `tensors_from_layer` writes.
    """
    own = {leaf: tensors[full] for leaf in LEAVES if (full := tensor_name(name, leaf)) in tensors}
    check_tensors(own, _expected(own, packed, weight_shape), of=f"Site {name!r}")
    weight, weight_scale = own["weight"], own["weight_scale"]
    table = {} if "act_scale" not in own else _table(own["act_scale"], own["act_qmin"].int(), own["act_qmax"].int(), kind)
    if packed is None or kind is None:
        return PackedLayer(
            kind=None, weight=dequantize_weight(weight, weight_scale).to(dtype), weight_scale=weight_scale, bias=bias, **table
        )
    if bits_of(packed) != bits_of(kind):
        weight = widened(weight, weight_shape[1])
    # Kernels copy 16 bytes at a time. A tensor of a file may start anywhere: it is moved once, here, not in every call.
    weight = weight if weight.data_ptr() % CHUNK == 0 else weight.clone()
    return PackedLayer(kind=kind, weight=weight, weight_scale=weight_scale, weight_sum=own["weight_sum"], bias=bias, **table)


def _expected(tensors: Mapping[str, Tensor], packed: CodeFormat | None, weight_shape: tuple[int, ...]) -> dict[str, Expected]:
    """Dtype and shape of a layer's tensors as `tensors_from_layer` writes them; the table rows are as many as `act_scale` has."""
    outputs, channels, *taps = weight_shape
    expected: dict[str, Expected] = {"weight": (torch.int8, weight_shape), "weight_scale": (torch.float32, (outputs,))}
    if packed is not None:
        expected["weight"] = (torch.uint8, (outputs, math.prod(taps), code_bytes(channels, bits_of(packed))))
        expected["weight_sum"] = (torch.int32, (outputs,))
    if packed is not None or "act_scale" in tensors:
        rows = (tensors["act_scale"].numel(),) if "act_scale" in tensors else (1,)
        expected |= {"act_scale": (torch.float32, rows), "act_qmin": (torch.int8, rows), "act_qmax": (torch.int8, rows)}
    return expected


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
