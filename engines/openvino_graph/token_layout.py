"""Exchange the orders of transposes and reshapes between feature maps and tokens, so that transposes are views of memory.

Convolutions here work on channels-last memory, in which [B, C, H, W] -> [B, H, W, C] -> [B, HW, C] moves nothing. Exported graphs go by
[B, C, HW], which OpenVINO makes planar first and then transposes: two copies each way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TOKENS = [0, 2, 1]  # [B, C, L] <-> [B, L, C], for one head [B, L, D] -> [B, D, L]
HEADS = [0, 2, 1, 3]  # [B, L, heads, D] -> [B, heads, L, D]
MAP_TO_LAST, LAST_TO_MAP = [0, 2, 3, 1], [0, 3, 1, 2]


def transposes_as_views(ov: Any, model: Any) -> None:
    """Rewrite, in place, the three orders of transposes and reshapes that surround attention; everything else stays.

    - GroupNormalization of [B, C, HW]: of the feature map instead, with the reshape after it.
    - [B, C, H, W] -> [B, C, HW] -> [B, HW, C] and back: through [B, H, W, C].
    - keys [B, heads, L, D] -> [B heads, L, D] -> [B heads, D, L] -> [B, heads, D, L]: one transpose from [B, L, heads, D], which fuses with the product.
    """
    ops = ov.opset13
    for norm in _of_type(model, "GroupNormalization"):
        _norm_before_reshape(ops, norm)
    for transpose in _of_type(model, "Transpose"):
        if _order(transpose) == TOKENS:
            _to_tokens(ops, transpose) or _to_map(ops, transpose) or _keys(ops, transpose)
    model.validate_nodes_and_infer_types()


def _of_type(model: Any, name: str) -> list[Any]:
    return [node for node in model.get_ordered_ops() if node.get_type_name() == name]


def _norm_before_reshape(ops: Any, norm: Any) -> None:
    reshape = norm.input_value(0).get_node()
    if reshape.get_type_name() != "Reshape" or not _flattens_map(reshape):
        return
    gamma, beta = norm.input_value(1), norm.input_value(2)
    attributes = norm.get_attributes()
    inner = ops.group_normalization(reshape.input_value(0), gamma, beta, attributes["num_groups"], attributes["epsilon"])
    inner.set_friendly_name(norm.get_friendly_name())
    outer = ops.reshape(inner, reshape.input_value(1), special_zero=reshape.get_attributes()["special_zero"])
    norm.output(0).replace(outer.output(0))


def _to_tokens(ops: Any, transpose: Any) -> bool:
    reshape = transpose.input_value(0).get_node()
    if reshape.get_type_name() != "Reshape" or not _flattens_map(reshape):
        return False
    channels = reshape.get_output_partial_shape(0)[1].get_length()
    last = ops.transpose(reshape.input_value(0), ops.constant(np.array(MAP_TO_LAST)))
    _replace(transpose, ops.reshape(last, ops.constant(np.array([0, -1, channels])), special_zero=True))
    return True


def _to_map(ops: Any, transpose: Any) -> bool:
    users = _users(transpose)
    if len(users) != 1 or users[0].get_type_name() != "Reshape":
        return False
    tokens, shape = transpose.input_value(0).get_partial_shape(), users[0].get_output_partial_shape(0)
    if len(shape) != 4 or shape[1].is_dynamic or tokens[2] != shape[1]:
        return False
    target = ops.gather(users[0].input_value(1), ops.constant(np.array(MAP_TO_LAST)), ops.constant(np.int64(0)))
    last = ops.reshape(transpose.input_value(0), target, special_zero=False)
    _replace(users[0], ops.transpose(last, ops.constant(np.array(LAST_TO_MAP))))
    return True


def _keys(ops: Any, transpose: Any) -> bool:
    users, inner = _users(transpose), transpose.input_value(0).get_node()
    if len(users) != 1 or {users[0].get_type_name(), inner.get_type_name()} != {"Reshape"}:
        return False
    heads = inner.input_value(0).get_node()
    shapes = heads.get_output_partial_shape(0), users[0].get_output_partial_shape(0)
    if heads.get_type_name() != "Transpose" or _order(heads) != HEADS or any(len(shape) != 4 for shape in shapes):
        return False
    before, after = shapes
    if any(dim.is_dynamic for dim in (before[1], before[3], after[1], after[2])) or (before[1], before[3]) != (after[1], after[2]):
        return False
    _replace(users[0], ops.transpose(heads.input_value(0), ops.constant(np.array(MAP_TO_LAST))))
    return True


def _flattens_map(reshape: Any) -> bool:
    """Whether it makes [B, C, HW] of [B, C, H, W]."""
    before, after = reshape.input_value(0).get_partial_shape(), reshape.get_output_partial_shape(0)
    return len(before) == 4 and len(after) == 3 and before[1].is_static and before[1] == after[1]


def _order(transpose: Any) -> list[int]:
    order = transpose.input_value(1).get_node()
    return [int(axis) for axis in order.data] if order.get_type_name() == "Constant" else []


def _users(node: Any) -> list[Any]:
    return [target.get_node() for target in node.output(0).get_target_inputs()]


def _replace(old: Any, new: Any) -> None:
    new.set_friendly_name(old.get_friendly_name())
    old.output(0).replace(new.output(0))
