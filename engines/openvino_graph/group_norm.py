"""Decompose group normalization so that it runs in the memory layout of the integer convolutions.

OpenVINO computes GroupNormalization on planar tensors and inserts a reorder before and after each, which take longer than the norm. Decomposed into
reductions per channel, arithmetic on [B, C] values, and one multiplication and addition per element, it needs no reorder, and the last two operations
fuse with the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


def split_group_norms(ov: Any, model: Any, *, bf16: bool) -> set[str]:
    """Rewrite each GroupNormalization of a model in place.

    With m_c and v_c mean and variance of channel c, and m, v those of a group of channels,

        v = mean over c of (v_c + (m_c - m)^2),    y = gamma / sqrt(v + epsilon) * (x - m_c + m_c - m) + beta

    In float32, v_c is the mean of (x - m_c)^2. In bfloat16, two passes over x are saved:

    - v_c is E[x^2] - m_c^2. Both are summed in float32, and the difference loses less than the rounding of x to bfloat16 has lost.
    - What is multiplied with and added to whole channels before the norm (scales and bias of a convolution, the time embedding) is not computed on the
      feature map: x = a z + t with one a and t per sample and channel has the mean a E[z] + t and the variance a^2 (E[z^2] - E[z]^2).

    Args:
        ov: The openvino module.
        model: An ov.Model; changed in place.
        bf16: Whether feature maps will be bfloat16.

    Returns:
        Names of the nodes on [B, C] values. They are to stay in float32, which costs nothing at that size; bfloat16 would shift a whole group.
    """
    small: set[str] = set()
    for norm in [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupNormalization"]:
        writer = _Writer(ov.opset13, norm.get_friendly_name(), small)
        norm.output(0).replace(_split(writer, norm, bf16).output(0))
    model.validate_nodes_and_infer_types()
    return small


def _split(writer: _Writer, norm: Any, bf16: bool) -> Any:
    """The nodes that compute `norm`; the last one has its name."""
    ops, node = writer.ops, writer.node
    gamma, beta = (norm.input_value(index) for index in (1, 2))
    groups, epsilon = norm.get_attributes()["num_groups"], norm.get_attributes()["epsilon"]
    shape = norm.get_output_partial_shape(0)
    channels = shape[1].get_length()
    z, a, t = _without_affine(writer, norm.input_value(0)) if bf16 else (norm.input_value(0), None, None)
    axes = list(range(2, len(shape)))
    spread_shape = [-1, channels] + [1] * len(axes)

    def grouped(value: Any) -> Any:
        return node("reshape", value, [0, groups, channels // groups], special_zero=True)

    def spread(value: Any) -> Any:
        return node("reshape", value, spread_shape, special_zero=False)

    # Not marked: what stays in float32 has float32 inputs, so that z would be converted, in a pass of its own. Sums are float32 in any case.
    mean_z = ops.reduce_mean(z, _constant(ops, axes), keep_dims=False)
    d = z if bf16 else ops.subtract(z, spread(mean_z))
    root = ops.reduce_l2(d, _constant(ops, axes), keep_dims=False)
    size = node("convert", node("reduce_prod", node("gather", node("shape_of", z), axes, 0), [0]), destination_type="f32")
    variance = node("divide", node("multiply", root, root), size)
    if bf16:
        variance = node("subtract", variance, node("multiply", mean_z, mean_z))
    mean = mean_z if a is None else node("multiply", mean_z, a)
    mean = mean if t is None else node("add", mean, t)
    variance = variance if a is None else node("multiply", variance, node("multiply", a, a))
    offset = grouped(mean)
    offset = node("subtract", offset, node("reduce_mean", offset, [2], keep_dims=True))
    variance = node("reduce_mean", node("add", grouped(variance), node("multiply", offset, offset)), [2], keep_dims=True)
    inverse = node("power", node("add", variance, epsilon), -0.5)
    factor = node("multiply", inverse, grouped(node("reshape", gamma, [1, channels], special_zero=False)))
    shift = node("add", node("multiply", offset, factor), grouped(node("reshape", beta, [1, channels], special_zero=False)))
    if bf16:
        factor, shift = (node("reshape", value, [-1, channels], special_zero=False) for value in (factor, shift))
        factor = _rounded(writer, factor if a is None else node("multiply", factor, a))
        shift = node("subtract", shift, node("multiply", factor, mean_z))
    y = ops.add(ops.multiply(d, spread(factor)), spread(shift))
    y.set_friendly_name(writer.name)
    return y


def _without_affine(writer: _Writer, x: Any) -> tuple[Any, Any, Any]:
    """`z, a, t` of x = a z + t, where a and t are [B or 1, C or 1], or None for 1 and 0.

    Only what is computed for x alone is removed; a value that others read has to be computed anyway.
    """
    steps = []
    while (step := _channel_step(x)) is not None:
        steps.append(step)
        x = step[2]
    a, t = _take_weight_scale(writer, x), None
    if a is not None:
        # Integers stay as they are, and the node is computed in the convolution. OpenVINO would move the scales of its inputs past the reductions into
        # a pass of their own, but not past this.
        x = writer.ops.round(x, "half_to_even").output(0)
    for op, number, _ in reversed(steps):
        number = writer.rows(number)
        if op == "Add":
            t = number if t is None else writer.node("add", t, number)
        else:
            a = number if a is None else writer.node("multiply", a, number)
            t = t if t is None else writer.node("multiply", t, number)
    return x, a, t


def _rounded(writer: _Writer, value: Any) -> Any:
    """A float32 value rounded to bfloat16's 8 bits of mantissa, so that nothing is lost where OpenVINO converts it, and what is computed from it agrees.

    Source: Dekker, A floating-point technique for extending the available precision (1971), splitting by 2^16 + 1.
    """
    wide = writer.node("multiply", value, 65537.0)
    return writer.node("subtract", wide, writer.node("subtract", wide, value))


def _take_weight_scale(writer: _Writer, x: Any) -> Any:
    """Remove the scales of the weight codes of the convolution that computes x, [1, C]; None where x is something else."""
    convolution = x.get_node()
    if convolution.get_type_name() != "Convolution" or len(x.get_target_inputs()) > 1:
        return None
    weight = convolution.input_value(1).get_node()
    if weight.get_type_name() != "Multiply" or weight.input_value(0).get_node().get_type_name() != "Convert":
        return None
    scale = weight.input_value(1)
    # Ones for each channel: without a multiplication, or by the number 1, OpenVINO does not recognise quantized weights.
    ones = writer.ops.constant(np.ones(list(scale.get_shape()), np.float32))
    unscaled = writer.ops.multiply(weight.input_value(0), ones)
    convolution.input(1).replace_source_output(unscaled.output(0))
    return writer.node("reshape", scale, [1, -1], special_zero=False)


def _channel_step(x: Any) -> tuple[str, Any, Any] | None:
    """The type of the node that computes x from another feature map and one number per sample or channel, that number, and the other feature map."""
    node = x.get_node()
    if node.get_type_name() not in ("Multiply", "Add") or len(x.get_target_inputs()) > 1:
        return None
    first, second = node.input_value(0), node.input_value(1)
    if _per_channel(second, like=x):
        return node.get_type_name(), second, first
    return (node.get_type_name(), first, second) if _per_channel(first, like=x) else None


def _per_channel(value: Any, *, like: Any) -> bool:
    shape, expected = value.get_partial_shape(), like.get_partial_shape()
    return len(shape) == len(expected) and all(dim.is_static and dim.get_length() == 1 for dim in list(shape)[2:])


@dataclass(frozen=True)
class _Writer:
    """Creates nodes on small values, and records their names.

    Attributes:
        ops: OpenVINO's operators.
        name: Name of the norm that is rewritten.
        small: Receives the names of the nodes.
    """

    ops: Any
    name: str
    small: set[str]

    def node(self, op: str, *inputs: Any, **attributes: Any) -> Any:
        """A node of that operator; numbers become constants."""
        constants = (_constant(self.ops, value) if isinstance(value, int | float | list) else value for value in inputs)
        result = getattr(self.ops, op)(*constants, **attributes)
        result.set_friendly_name(f"{self.name}/{op}_{len(self.small)}")
        self.small.add(result.get_friendly_name())
        return result

    def rows(self, value: Any) -> Any:
        """A value [B or 1, C or 1, 1, ...] as [B or 1, C or 1]."""
        return self.node("reshape", value, [-1, value.get_partial_shape()[1].get_length()], special_zero=False)


def _constant(ops: Any, value: float | list[int]) -> Any:
    return ops.constant(np.array(value, np.float32 if isinstance(value, float) else np.int64))
