"""Whether OpenVINO's INT8 products are exact on this CPU.

Without VNNI or AMX, x86 multiplies 8-bit integers with VPMADDUBSW, which adds pairs of products in 16 bits and saturates. oneDNN then either accepts the
saturation or, for signed inputs of a convolution, halves the weights beforehand, which drops their lowest bit. Measured on a Haswell (OpenVINO 2026.4, emulated by
qemu): outputs of 3x3 convolutions wrong by 13 to 25 % of their largest value at W4A4, of linear layers by 7 to 65 % at W8A8, on random codes.

Source: https://uxlfoundation.github.io/oneDNN/dev_guide_int8_computations.html; NNCF's `OverflowFix`, which spends a bit of the weights on it instead.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from engines.openvino_graph.core import core

CHANNELS = 32
LARGEST = 127  # code
WEIGHT_CODES = (127, 3)  # of two products of the first the sum exceeds 16 bits; halving the second changes it
IN_FLOAT_REASON = (
    "This CPU has neither VNNI nor AMX: its 8-bit products saturate. OpenVINO computes the quantized layers in float32 on the same codes instead, "
    "which is exact and slower."
)


@functools.cache
def exact_integer_products(ov: Any) -> bool:
    """Compare a 3x3 convolution and a linear layer of W8A8 with their exact sums. Computed once a process, in 0.1 s.

    Args:
        ov: The openvino module.
    """
    return all(_products(ov, code) == (9 * CHANNELS * LARGEST * code, CHANNELS * LARGEST * code) for code in WEIGHT_CODES)


def _products(ov: Any, code: int) -> tuple[float, float]:
    """The sums of a convolution's inner pixel and of a linear layer, whose inputs all have the largest code and whose weights all have this one."""
    model = two_products(ov, np.full((CHANNELS, CHANNELS, 3, 3), code, np.int8))
    compiled = core(ov).compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    results = compiled([np.full([int(size) for size in port.shape], LARGEST, np.float32) for port in compiled.inputs])
    convolved, linear = (results[index] for index in range(2))
    return float(convolved[0, 0, 1, 1]), float(linear[0, 0])


def weights_to_float32(ov: Any, model: Any) -> None:
    """Replace INT8 weights by float32 ones of the same values, so that products are computed in float32: exact on the codes, four times the memory.

    OpenVINO has no documented property for it, and where only its low-precision transformations are off, it quantizes the inputs of linear layers itself.

    Args:
        ov: The openvino module.
        model: An ov.Model; changed in place.
    """
    for node in model.get_ordered_ops():
        source = node.input_value(0).get_node() if node.get_type_name() == "Convert" else None
        if source is not None and source.get_type_name() == "Constant" and source.get_output_element_type(0) == ov.Type.i8 and source.shape:
            node.output(0).replace(ov.op.Constant(source.data.astype(np.float32)).output(0))


def two_products(ov: Any, weight: np.ndarray[Any, np.dtype[np.int8]]) -> Any:
    """A model of two inputs, float32 [1, C, 4, 4] and [4, C]: a 3x3 convolution of the one, a linear layer of the other.

    Quantized as in an exported graph, with scales of 1.

    Args:
        ov: The openvino module.
        weight: Codes, int8 [C, C, 3, 3]; the linear layer takes those of the first tap.
    """
    ops = ov.opset13
    image = ops.parameter([1, CHANNELS, 4, 4], np.float32)
    vectors = ops.parameter([4, CHANNELS], np.float32)
    convolved = ops.convolution(_quantized(ops, image), _dequantized(ops, ops.constant(weight)), [1, 1], [1, 1], [1, 1], [1, 1])
    linear = ops.matmul(_quantized(ops, vectors), _dequantized(ops, ops.constant(weight[:, :, 0, 0].copy())), False, True)
    return ov.Model([convolved, linear], [image, vectors])


def _quantized(ops: Any, x: Any) -> Any:
    low, high = np.float32(-128), np.float32(LARGEST)
    return _dequantized(ops, ops.convert(ops.fake_quantize(x, low, high, low, high, 256), np.int8))


def _dequantized(ops: Any, codes: Any) -> Any:
    return ops.multiply(ops.convert(codes, np.float32), np.float32(1))
