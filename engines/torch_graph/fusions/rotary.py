"""Rotary position embedding of queries and keys, a dozen operations of torch in float32, as one kernel with the same result."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from engines.kernels.launch import OCTET
from engines.torch_graph.fx_helpers import aten, calls, value_of
from engines.torch_graph.rewrite import GraphRewrite, kernels


def fuse_rotary(rewritten: GraphRewrite) -> None:
    """Replace `(x * cos + rotated(x) * sin)` in float32, as diffusers' `apply_rotary_emb` writes it for neighbouring channels, by the kernel."""
    angles: dict[Any, Any] = {}
    for cast in calls(rewritten.graph, aten.to.dtype):
        found = _rotation(cast.args[0])
        if found is None or cast.args[1] != rewritten.dtype or value_of(found[0]).dtype != rewritten.dtype:
            continue
        x, cosine, sine = found
        for each in (cosine, sine):
            if each not in angles:
                with rewritten.graph.inserting_after(each):
                    angles[each] = rewritten.graph.call_function(aten.squeeze.dims, (each, [0, 2]))
        with rewritten.graph.inserting_before(cast):
            turned = rewritten.graph.call_function(kernels.rotary.default, (x, angles[cosine], angles[sine]))
        turned.meta = dict(cast.meta)
        cast.replace_all_uses_with(turned)
    rewritten.graph.eliminate_dead_code()


def _rotation(total: Any) -> tuple[Any, Any, Any] | None:
    """(x [B, L, H, D], cosine, sine [1, L, 1, D]) of a sum."""
    if not _calls(total, aten.add.Tensor) or total.kwargs:
        return None
    plain, turned = (_product(each) for each in total.args)
    if plain is None or turned is None:
        return None
    (x, cosine), (pairs, sine) = plain, turned
    width = value_of(x).shape[-1]
    if _partner(pairs) is not x or value_of(x).ndim != 4 or not isinstance(width, int) or width % OCTET:
        return None
    return (x, cosine, sine) if _are_angles(cosine) and _are_angles(sine) else None


def _product(node: Any) -> tuple[Any, Any] | None:
    """(value before its cast to float32, factor) of a product."""
    if not _calls(node, aten.mul.Tensor):
        return None
    cast, factor = node.args
    if not _calls(cast, aten.to.dtype) or cast.args[1] != torch.float32 or not isinstance(factor, fx.Node):
        return None
    return cast.args[0], factor


def _partner(flat: Any) -> Any | None:
    """The x of `stack([-x_odd, x_even], -1).flatten(3)`, x_even and x_odd from `x.reshape(..., -1, 2).unbind(-1)`."""
    if not (_calls(flat, aten.flatten.using_ints) and tuple(flat.args[1:]) in ((3,), (3, -1), (3, 4))):
        return None
    stack = flat.args[0]
    if not (_calls(stack, aten.stack.default) and stack.args[1:] in ((-1,), (4,)) and len(stack.args[0]) == 2):
        return None
    negative, even = stack.args[0]
    if not _calls(negative, aten.neg.default):
        return None
    odd = negative.args[0]
    if not (
        _calls(even, operator.getitem)
        and _calls(odd, operator.getitem)
        and even.args[0] is odd.args[0]
        and (even.args[1], odd.args[1]) == (0, 1)
    ):
        return None
    unbind = even.args[0]
    if not (_calls(unbind, aten.unbind.int) and unbind.args[1:] in ((-1,), (4,))):
        return None
    pairs = unbind.args[0]
    shape = value_of(pairs).shape
    return pairs.args[0] if _calls(pairs, aten.reshape.default) and len(shape) == 5 and shape[-1] == 2 else None


def _are_angles(node: Any) -> bool:
    """Whether a node is float32 [1, L, 1, D]."""
    value = value_of(node)
    return value.dtype == torch.float32 and value.ndim == 4 and (str(value.shape[0]), str(value.shape[2])) == ("1", "1")


def _calls(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is target
