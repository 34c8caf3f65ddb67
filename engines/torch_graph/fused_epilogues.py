"""Epilogues of the layers: what is added to a layer's output where nothing else reads it."""

from __future__ import annotations

from typing import Any

from torch import fx

from engines.torch_graph.fused_prologues import RESHAPES
from engines.torch_graph.fx_helpers import aten, calls, permutes, same_shape, same_size, value_of
from engines.torch_graph.rewrite import PRODUCTS, GraphRewrite, kernels

RESIDUAL = [argument.name for argument in kernels.conv2d.default._schema.arguments].index("residual")


def fuse_residual(rewritten: GraphRewrite) -> None:
    """Move the addition of a residual into the epilogue of the layer whose output it is added to, where nothing else reads that output."""
    for add in calls(rewritten.graph, aten.add.Tensor):
        if add.kwargs:
            continue  # alpha scales the second summand
        for summand, other in (add.args[:2], add.args[1::-1]):
            chain = _map_of_tokens(summand)
            product = summand if chain is None else chain[0]
            if not _takes_residual(rewritten, product, other, summand):
                continue
            with rewritten.graph.inserting_before(add):
                if chain is None:
                    fused = _with_residual(rewritten, product, other)
                    fused.meta = dict(add.meta)
                else:
                    fused = _with_residual(rewritten, product, _tokens(rewritten, other))
                    fused.meta = dict(product.meta)
                    for view in chain[1:]:
                        meta = dict(view.meta)
                        fused = rewritten.graph.call_function(view.target, (fused, *view.args[1:]))
                        fused.meta = meta
            add.replace_all_uses_with(fused)
            for node in (add, *reversed(chain or ()), *(() if chain else (product,))):
                rewritten.graph.erase_node(node)
            break


def _with_residual(rewritten: GraphRewrite, product: Any, residual: Any) -> Any:
    fused = rewritten.graph.call_function(product.target, (*product.args[:RESIDUAL], residual, *product.args[RESIDUAL + 1 :]))
    for name, node in rewritten.products.items():
        if node is product:
            rewritten.products[name] = fused
    return fused


def _tokens(rewritten: GraphRewrite, x: Any) -> Any:
    """A map [B, C, H, W] as [B, HW, C]: a view where it is channels last."""
    last = rewritten.graph.call_function(aten.permute.default, (x, [0, 2, 3, 1]))
    return rewritten.graph.call_function(aten.flatten.using_ints, (last, 1, 2))


def _takes_residual(rewritten: GraphRewrite, product: Any, other: Any, summand: Any) -> bool:
    """Whether a layer's output, of which `summand` is a view or itself, is read by one addition only, of a value of the same shape and type."""
    if not (isinstance(product, fx.Node) and isinstance(other, fx.Node)) or summand is other:
        return False
    alone = product.target in PRODUCTS and product.args[RESIDUAL] is None and len(product.users) == 1
    return alone and same_shape(summand, other) and value_of(other).dtype == rewritten.dtype


def _map_of_tokens(node: Any) -> tuple[Any, Any, Any] | None:
    """(tokens [B, HW, C], reshape, permute) where `node` is a map [B, C, H, W] made of them and nothing else reads either."""
    if not (permutes(node, (0, 3, 1, 2)) and len(node.users) == 1):
        return None
    reshape = node.args[0]
    if not (isinstance(reshape, fx.Node) and reshape.target in RESHAPES and len(reshape.users) == 1):
        return None
    tokens = reshape.args[0]
    if not isinstance(tokens, fx.Node) or value_of(tokens).ndim != 3:
        return None
    (batch, _, channels), shape = value_of(tokens).shape, value_of(reshape).shape
    return (tokens, reshape, node) if same_size(shape[0], batch) and same_size(shape[3], channels) else None
