"""Signatures of the two TensorRT plugins that compute a 4-bit site, for exporter and engine: names, inputs and attributes.

    EdmQuantize   x float16 [N, C, H, W], or [N, H, W, C]  ->  codes int8 [N, H, W, Cb], packed as by `kernel_layout.pack_codes`
    EdmConv       codes int8 [N, H, W, Cb]                 ->  float16 [N, P, Q, K]

Packed codes have type INT8, because TensorRT has no 4-bit activations. Every scale and bound is a tensor: a plugin's kernel takes pointers and integers.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMESPACE = "edm_deploy"  # namespace in TensorRT's plugin registry, and domain of the ONNX nodes
VERSION = "1"  # the only version of TensorRT's quick plugins


@dataclass(frozen=True)
class Plugin:
    """A plugin's signature.

    Attributes:
        name: The op type. TensorRT's parser finds an op by its name alone, which must therefore differ from every standard op's.
        inputs: Names of the input tensors, in order.
        types: TensorRT's names of the inputs' types, then of the output's.
        attributes: Names of the integer attributes, in order.
    """

    name: str
    inputs: tuple[str, ...]
    types: tuple[str, ...]
    attributes: tuple[str, ...]

    @property
    def id(self) -> str:
        """Namespace and name, such as `edm_deploy::EdmConv`."""
        return f"{NAMESPACE}::{self.name}"


QUANTIZE = Plugin(
    "EdmQuantize",
    inputs=("x", "row", "inv_scale", "qmin", "qmax"),
    types=("FP16", "INT32", "FP32", "INT32", "INT32", "INT8"),
    attributes=("bits", "unsigned_codes", "channels_last"),
)
CONV = Plugin(
    "EdmConv",
    inputs=("codes", "weight", "zero", "row", "act_scale", "qmin", "weight_scale", "weight_sum", "bias"),
    types=("INT8", "INT8", "INT8", "INT32", "FP32", "INT32", "FP32", "INT32", "FP32", "FP16"),
    attributes=("bits", "unsigned_codes", "kernel", "padding", "stride"),
)
PLUGINS = (QUANTIZE, CONV)
