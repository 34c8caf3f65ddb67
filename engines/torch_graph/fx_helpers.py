"""Helpers for graphs from torch's tracer: remove nodes that compute nothing, merge equal ones, read dtypes and shapes from fake tensors."""

from __future__ import annotations

import operator
import sys
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

aten: Any = torch.ops.aten


PURE = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)  # of sizes, and of an operator's several results


def clean(graph: fx.Graph, device: torch.device) -> None:
    """Remove the tracer's checks and nodes that compute nothing, and set the device that the graph will run on."""
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.op == "call_module" or node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)  # the tracer's own checks
        elif _does_nothing(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target is aten.view.default:
            node.target = (
                aten.reshape.default
            )  # the trace ran channels first; the rewritten graph is channels last, where not every view exists
    for node in graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": device}


def _does_nothing(node: Any) -> bool:
    if node.op != "call_function":
        return False
    if node.target is aten.dropout.default:
        return not node.args[2]
    # It changes strides only. The rewritten graph is channels last, and its views are reshapes, so no operator depends on them.
    if node.target is aten.contiguous.default:
        return True
    if node.target is aten.to.dtype:
        return len(node.args) == 2 and value_of(node.args[0]).dtype == node.args[1]
    if node.target is aten.slice.Tensor:  # x[:, None] is traced as a slice of all of x
        start, end, step = (node.args[place] if len(node.args) > place else default for place, default in ((2, None), (3, None), (4, 1)))
        return start in (0, None) and (end is None or end == sys.maxsize) and step == 1
    if node.target in (aten.div.Tensor, aten.mul.Tensor):  # diffusers divides by output_scale_factor, which is 1 for most models
        return node.args[1] == 1 and value_of(node.args[0]).is_floating_point()
    return False


def merge_equal(graph: fx.Graph) -> None:
    """Compute once what several nodes compute from the same inputs, such as the SiLU of the time embedding in front of every block's projection."""
    first: dict[Hashable, Any] = {}
    nodes: list[Any] = list(graph.nodes)
    for node in nodes:
        if node.op != "call_function" or not _is_pure(node.target):
            continue
        key = (node.target, _frozen(node.args), _frozen(node.kwargs))
        if (kept := first.setdefault(key, node)) is not node:
            node.replace_all_uses_with(kept)
            graph.erase_node(node)


def _is_pure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return target in PURE
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags and bool(target._schema.returns)


def _frozen(value: Any) -> Hashable:
    """An argument of a node as a dictionary's key. 1, 1.0 and True are different arguments."""
    if isinstance(value, list | tuple):
        return tuple(_frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(item)) for name, item in value.items())
    return value if isinstance(value, fx.Node) else (type(value), repr(value))


def value_of(node: Any) -> Tensor:
    """The fake tensor that the tracer recorded for a node: its dtype, rank and symbolic shape."""
    value: Tensor = node.meta["val"]
    return value


def same_shape(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes hold tensors of one shape, whatever the batch and size."""
    shapes = value_of(a).shape, value_of(b).shape
    return len(shapes[0]) == len(shapes[1]) and all(same_size(x, y) for x, y in zip(*shapes, strict=True))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are one number or one symbol; comparing symbols would be a guard."""
    return str(a) == str(b)


def calls(graph: fx.Graph, target: Any) -> list[Any]:  # fx.Node, whose argument types are too wide to be useful
    """The nodes that call an operator."""
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def permutes(node: Any, axes: tuple[int, ...]) -> bool:
    """Whether a node permutes four axes in this order."""
    if not (isinstance(node, fx.Node) and node.target is aten.permute.default):
        return False
    order: Any = node.args[1]
    return tuple(axis % 4 for axis in order) == axes


def per_sample(node: Any, like: Any) -> Any | None:
    """`node` where it holds one vector of channels for each sample of `like`, broadcast over what is between: [B, 1, C] for tokens, [B, C, 1, 1] for a map."""
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    shape, whole = value_of(node).shape, value_of(like).shape
    channels = 1 if len(whole) == 4 else len(whole) - 1
    if len(shape) != len(whole) or len(whole) < 3:
        return None
    matches = all(same_size(size, whole[axis] if axis in (0, channels) else 1) for axis, size in enumerate(shape))
    return node if matches else None


def vectors(graph: fx.Graph, columns: Any) -> Any:
    """A node [B, C] of one vector for each sample: `columns` without the axes of one element that it is broadcast over."""
    while columns.target is aten.unsqueeze.default and value_of(columns).ndim > 2:
        columns = columns.args[0]
    rank = value_of(columns).ndim
    if rank == 2:
        return columns
    return graph.call_function(aten.squeeze.dims, (columns, [2, 3] if rank == 4 else [1]))
