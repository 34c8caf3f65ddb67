"""What artifact.json states, and how a quantized layer becomes tensors of artifact.safetensors and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from msgspec import Meta
from torch import Tensor

from edm_deploy.artifact.quantized_layer import RELAXED_BITS, Op, QuantizedLayer
from edm_deploy.errors import ArtifactError
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import ACTIVATION_BITS, WEIGHT_BITS, fits_int4, pack_int4, unpack_int4
from edm_deploy.storage.json_schema import Sha256, Size
from edm_deploy.storage.tensor_file import DeferredTensor


@dataclass(frozen=True, kw_only=True)
class LayerDescription:
    """A quantized layer in artifact.json.

    Attributes:
        op: `conv2d` or `linear`.
        weight_shape: Of its codes, which may be packed.
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or None where only the weight is quantized.
    """

    op: Op
    weight_shape: Annotated[tuple[Size, ...], Meta(min_length=2, max_length=4)]
    weight_bits: Annotated[int, Meta(ge=WEIGHT_BITS.start, lt=WEIGHT_BITS.stop)]
    act_bits: Annotated[int, Meta(ge=ACTIVATION_BITS.start, lt=ACTIVATION_BITS.stop)] | None


@dataclass(frozen=True, kw_only=True)
class ArtifactDescription:
    """artifact.json, without its schema number. Attributes as in `Artifact`.

    Attributes:
        tensors_sha256: Of artifact.safetensors.
        digest: Of everything that decides what an engine computes.
    """

    family: str
    config: Mapping[str, Any]
    sites: Mapping[str, LayerDescription]
    tensors_sha256: Sha256
    digest: Sha256
    structure: NetworkRewrite = PUBLISHED
    folded: tuple[str, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


class TensorReader:
    """The tensors of a file by name, each with an expected dtype; what is never taken is an error at the end."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.taken: set[str] = set()

    def take(self, name: str, *dtypes: torch.dtype) -> Tensor:
        """A tensor of one of `dtypes`; ArtifactError where it is missing or has another dtype."""
        if name not in self.tensors:
            raise ArtifactError(f"tensor {name!r} is missing. Make the artifact again.")
        if self.tensors[name].dtype not in dtypes:
            expected = " or ".join(map(str, dtypes))
            raise ArtifactError(f"tensor {name!r} is {self.tensors[name].dtype}, expected {expected}. Make the artifact again.")
        self.taken.add(name)
        return self.tensors[name]

    def take_if_present(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """As `take`; None where the file has no such tensor."""
        return self.take(name, dtype) if name in self.tensors else None

    def check_all_taken(self) -> None:
        """Raises ArtifactError where artifact.json does not describe a tensor."""
        if left := sorted(set(self.tensors) - self.taken):
            raise ArtifactError(f"tensor {left[0]!r} belongs to nothing that artifact.json describes. Make the artifact again.")


def tensors_from_layer(name: str, layer: QuantizedLayer) -> dict[str, DeferredTensor]:
    """The tensors of a quantized layer, by their names in artifact.safetensors."""
    tensors: dict[str, DeferredTensor] = {"codes": _stored_codes(layer.codes), "weight_scale": DeferredTensor.of(layer.weight_scale)}
    if layer.channel_bits is not None:
        tensors["channel_bits"] = DeferredTensor.of(layer.channel_bits)
    for prefix, table in (("act", layer.activation), ("relaxed", layer.relaxed_activation)):
        if table is not None:
            columns = {"scale": table.scale, "qmin": table.qmin, "qmax": table.qmax}
            tensors |= {f"{prefix}_{leaf}": DeferredTensor.of(column) for leaf, column in columns.items()}
    return {f"sites.{name}.{leaf}": tensor for leaf, tensor in tensors.items()}


def layer_from_tensors(name: str, description: LayerDescription, reader: TensorReader) -> QuantizedLayer:
    """The inverse of `tensors_from_layer`.

    Raises:
        ArtifactError: A tensor is missing, has another dtype, or does not have as many codes as `weight_shape`.
    """
    prefix = f"sites.{name}"
    codes, shape = reader.take(f"{prefix}.codes", torch.int8, torch.uint8), description.weight_shape
    count = math.prod(shape)
    if codes.numel() != ((count + 1) // 2 if codes.dtype == torch.uint8 else count):
        held = 2 * codes.numel() if codes.dtype == torch.uint8 else codes.numel()
        raise ArtifactError(
            f"tensor '{prefix}.codes' holds {held} codes, expected {count} of shape {list(shape)}. Make the artifact again."
        )
    relaxed = _table(f"{prefix}.relaxed", RELAXED_BITS, reader) if f"{prefix}.relaxed_scale" in reader.tensors else None
    return QuantizedLayer(
        op=description.op,
        codes=unpack_int4(codes, shape) if codes.dtype == torch.uint8 else codes,
        weight_scale=reader.take(f"{prefix}.weight_scale", torch.float32),
        weight_bits=description.weight_bits,
        channel_bits=reader.take_if_present(f"{prefix}.channel_bits", torch.uint8),
        activation=None if description.act_bits is None else _table(f"{prefix}.act", description.act_bits, reader),
        relaxed_activation=relaxed,
    )


def _table(prefix: str, bits: int, reader: TensorReader) -> ActivationTable:
    return ActivationTable(
        bits=bits,
        scale=reader.take(f"{prefix}_scale", torch.float32),
        qmin=reader.take(f"{prefix}_qmin", torch.int8),
        qmax=reader.take(f"{prefix}_qmax", torch.int8),
    )


def tensor_from_param(value: Tensor) -> DeferredTensor:
    """A parameter in float16 where that is exact, in float32 otherwise."""
    exact = torch.equal(value.to(torch.float16).float(), value.float())
    dtype = torch.float16 if exact else torch.float32
    return DeferredTensor(dtype, tuple(value.shape), lambda: value.to(dtype))


def _stored_codes(codes: Tensor) -> DeferredTensor:
    """Weight codes, packed two to a byte where all fit in 4 bits."""
    if not fits_int4(codes):
        return DeferredTensor.of(codes)
    return DeferredTensor(torch.uint8, ((codes.numel() + 1) // 2,), lambda: pack_int4(codes))
