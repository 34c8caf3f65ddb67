"""The two TensorRT plugins that compute a 4-bit site, as exporter and engine both speak of them: their names, inputs, attributes and what they compute.

    EdmQuantize   x float16 [N, C, H, W], or [N, H, W, C]  ->  codes int8 [N, H, W, Cb], packed as `packing.py` says
    EdmConv       codes int8 [N, H, W, Cb]                 ->  float16 [N, P, Q, K]

Packed codes travel as INT8: TensorRT has no 4-bit activations. Every scale and bound is a tensor, since a plugin's kernel takes pointers and integers only.
"""

from __future__ import annotations

from dataclasses import dataclass

NAMESPACE = "edm_deploy"  # of the plugins in TensorRT's registry, and the domain of their ONNX nodes
VERSION = "1"  # the only one that TensorRT's quick plugins have


@dataclass(frozen=True)
class Plugin:
    """A plugin's signature.

    Attributes:
        name: Its op type. TensorRT's parser looks an op up by this name alone, so it must be no standard op's.
        inputs: Names of its tensors, in order.
        types: Their types, as TensorRT spells them, and the output's at the end.
        attributes: Names of its integers, in order.
    """

    name: str
    inputs: tuple[str, ...]
    types: tuple[str, ...]
    attributes: tuple[str, ...]

    @property
    def id(self) -> str:
        """`edm_deploy::EdmConv`."""
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
