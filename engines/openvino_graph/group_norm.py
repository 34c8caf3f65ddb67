"""Decompose group normalization so that it runs in the memory layout of the integer convolutions.

OpenVINO computes GroupNormalization on planar tensors and inserts a reorder before and after each, which take longer than the norm. Decomposed into
reductions per channel, arithmetic on [B, C] values, and one multiplication and addition per element, it needs no reorder, and the last two operations
fuse with the next.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def split_group_norms(ov: Any, model: Any) -> set[str]:
    """Rewrite each GroupNormalization of a model in place.

    With m_c the mean of channel c, d = x - m_c, and m, v mean and variance of a group of channels,

        v = mean over c of (mean of d^2 + (m_c - m)^2),    y = gamma / sqrt(v + epsilon) * (d + m_c - m) + beta

    The squares are of d, not of x: in bfloat16, sums of x^2 lose a variance that is small compared with the squared mean.

    Returns:
        Names of the nodes on [B, C] values. They are to stay in float32, which costs nothing at that size; bfloat16 would shift a whole group.
    """
    small: set[str] = set()
    for norm in [node for node in model.get_ordered_ops() if node.get_type_name() == "GroupNormalization"]:
        small |= _split(ov, norm)
    model.validate_nodes_and_infer_types()
    return small


def _split(ov: Any, norm: Any) -> set[str]:
    ops = ov.opset13
    x, gamma, beta = (norm.input_value(index) for index in range(3))
    groups, epsilon = norm.get_attributes()["num_groups"], norm.get_attributes()["epsilon"]
    shape = norm.get_output_partial_shape(0)
    channels = shape[1].get_length()
    by_group, by_channel = [0, groups, channels // groups], [-1, channels] + [1] * (len(shape) - 2)
    axes = list(range(2, len(shape)))
    small: set[str] = set()

    def node(op: str, *inputs: Any, **attributes: Any) -> Any:
        constants = (_constant(ops, value) if isinstance(value, int | float | list) else value for value in inputs)
        result = getattr(ops, op)(*constants, **attributes)
        result.set_friendly_name(f"{norm.get_friendly_name()}/{op}_{len(small)}")
        small.add(result.get_friendly_name())
        return result

    def grouped(value: Any) -> Any:
        return node("reshape", value, by_group, special_zero=True)

    mean_c = ops.reduce_mean(x, _constant(ops, axes), keep_dims=True)
    d = ops.subtract(x, mean_c)
    root = ops.reduce_l2(d, _constant(ops, axes), keep_dims=True)
    size = node("convert", node("reduce_prod", node("gather", node("shape_of", x), axes, 0), [0]), destination_type="f32")
    squares = node("divide", grouped(node("multiply", root, root)), size)
    offset = grouped(mean_c)
    offset = node("subtract", offset, node("reduce_mean", offset, [2], keep_dims=True))
    variance = node("reduce_mean", node("add", squares, node("multiply", offset, offset)), [2], keep_dims=True)
    factor = node(
        "multiply", node("power", node("add", variance, epsilon), -0.5), grouped(node("reshape", gamma, [1, channels], special_zero=False))
    )
    shift = node("add", node("multiply", offset, factor), grouped(node("reshape", beta, [1, channels], special_zero=False)))
    spread = (node("reshape", value, by_channel, special_zero=False) for value in (factor, shift))
    y = ops.add(ops.multiply(d, next(spread)), next(spread))
    y.set_friendly_name(norm.get_friendly_name())
    norm.output(0).replace(y.output(0))
    return small


def _constant(ops: Any, value: float | list[int]) -> Any:
    return ops.constant(np.array(value, np.float32 if isinstance(value, float) else np.int64))
