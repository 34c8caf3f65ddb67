"""Fuse redundant memory-bound operations of a rewritten graph into adjacent kernels. Each fusion is one pass over the graph.

    silu -> quantize                             SiLU in float32 before rounding
    group_norm -> quantize                       statistics in separate kernels, the rest while quantizing
    group_norm -> tokens of a map -> quantize    likewise: the map is quantized, and its codes are read as tokens
    conv2d | linear -> add                       the other summand enters the epilogue, in float32
    linear -> map of its tokens -> add           likewise: the other summand is read as tokens

A fused value is not rounded to float16 in between, so codes may differ from the unfused graph's where a value is close to a rounding tie.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from engines.torch_graph.fx_helpers import aten, same_shape, value_of
from engines.torch_graph.rewrite import PRODUCTS, GraphRewrite, kernels

QUANTIZE = kernels.quantize.default
SILU = len(QUANTIZE._schema.arguments) - 1  # place of the flag among quantize's arguments
RESHAPES = (aten.reshape.default, aten.flatten.using_ints)
RESIDUAL = [argument.name for argument in kernels.conv2d.default._schema.arguments].index("residual")


def fuse(rewritten: GraphRewrite) -> None:
    """Apply all fusions, in the order in which one enables the next."""
    fuse_silu(rewritten)
    fuse_group_norm(rewritten)
    fuse_residual(rewritten)


def fuse_silu(rewritten: GraphRewrite) -> None:
    """Move a SiLU whose result is only quantized into the quantizers' prologue."""
    for silu in _calls(rewritten.graph, aten.silu.default):
        if _feeds_quantizers(silu) and not any(quantize.args[SILU] for quantize in _quantizers(silu)):
            x = silu.args[0]
            for quantize in _quantizers(silu):
                quantize.args = (x, *quantize.args[1:SILU], True)
            silu.replace_all_uses_with(x)  # the readers of its sizes
            rewritten.graph.erase_node(silu)


def fuse_group_norm(rewritten: GraphRewrite) -> None:
    """Split a group norm whose result is only quantized: statistics in one kernel, normalization and affine part while quantizing."""
    for norm in _calls(rewritten.graph, aten.group_norm.default):
        x, y, tokens = norm.args[0], norm, False
        if value_of(x).ndim == 3:  # attention: [B, C, L] between two transposes of [B, L, C]
            y = next(iter(norm.users))
            if len(norm.users) > 1 or not (_swaps(x) and _swaps(y)):
                continue
            x = x.args[0]
        elif (as_tokens := _tokens_of(norm)) is not None:  # a map [B, C, H, W] that is read as [B, HW, C]
            y, tokens = as_tokens, True
        if _feeds_quantizers(y) and value_of(x).dtype == rewritten.dtype:
            _norm_into(rewritten, norm, x, _quantizers(y), tokens=tokens)
            if tokens:
                norm.replace_all_uses_with(x)  # the tokens, of which only the sizes are read
            else:
                y.replace_all_uses_with(x)  # the readers of its sizes


def _norm_into(rewritten: GraphRewrite, norm: Any, x: Any, quantizers: list[Any], *, tokens: bool) -> None:
    groups, gamma, beta, eps = (*norm.args[1:5], None, None, 1e-5)[:4] if len(norm.args) < 5 else norm.args[1:5]
    with rewritten.graph.inserting_before(norm):
        stats = rewritten.graph.call_function(kernels.group_stats.default, (x, groups, eps))
        mean, rstd = (rewritten.graph.call_function(_item, (stats, index)) for index in (0, 1))
        gamma, beta = (_float32(rewritten, column) for column in (gamma, beta))
    for quantize in quantizers:
        with rewritten.graph.inserting_before(quantize):
            fused = rewritten.graph.call_function(kernels.quantize_normed.default, (x, mean, rstd, gamma, beta, groups, *quantize.args[1:]))
            if tokens:  # codes [B, H, W, Cb] as [B, HW, 1, Cb]
                fused = rewritten.graph.call_function(aten.flatten.using_ints, (fused, 1, 2))
                fused = rewritten.graph.call_function(aten.unsqueeze.default, (fused, 2))
        for name, codes in rewritten.codes.items():
            if codes is quantize:
                rewritten.codes[name] = fused
        quantize.replace_all_uses_with(fused)
        rewritten.graph.erase_node(quantize)


def fuse_residual(rewritten: GraphRewrite) -> None:
    """Move the addition of a residual into the epilogue of the layer whose output it is added to, where nothing else reads that output."""
    for add in _calls(rewritten.graph, aten.add.Tensor):
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
    if not (_permutes(node, (0, 3, 1, 2)) and len(node.users) == 1):
        return None
    reshape = node.args[0]
    if not (isinstance(reshape, fx.Node) and reshape.target in RESHAPES and len(reshape.users) == 1):
        return None
    tokens = reshape.args[0]
    if not isinstance(tokens, fx.Node) or value_of(tokens).ndim != 3:
        return None
    (batch, _, channels), shape = value_of(tokens).shape, value_of(reshape).shape
    return (tokens, reshape, node) if _same(shape[0], batch) and _same(shape[3], channels) else None


def _tokens_of(node: Any) -> Any | None:
    """The tokens [B, HW, C] of a map [B, C, H, W], where nothing else reads the map."""
    if value_of(node).ndim != 4 or len(node.users) != 1:
        return None
    last = next(iter(node.users))
    if not (_permutes(last, (0, 2, 3, 1)) and len(last.users) == 1):
        return None
    tokens = next(iter(last.users))
    if tokens.target not in RESHAPES or value_of(tokens).ndim != 3:
        return None
    (batch, _, channels), shape = value_of(tokens).shape, value_of(last).shape
    return tokens if _same(shape[0], batch) and _same(shape[3], channels) else None


def _permutes(node: Any, axes: tuple[int, ...]) -> bool:
    if not (isinstance(node, fx.Node) and node.target is aten.permute.default):
        return False
    order: Any = node.args[1]
    return tuple(axis % 4 for axis in order) == axes


def _same(a: Any, b: Any) -> bool:
    return str(a) == str(b)  # sizes may be symbols, of which equality would be a guard


def _calls(graph: fx.Graph, target: Any) -> list[Any]:  # fx.Node, whose argument types are too wide to be useful
    return [node for node in graph.nodes if node.op == "call_function" and node.target is target]


def _quantizers(node: Any) -> list[Any]:
    return [user for user in node.users if user.target is QUANTIZE and user.args[0] is node]


def _feeds_quantizers(node: Any) -> bool:
    """Whether a value is quantized, and otherwise only its sizes are read."""
    quantizers = _quantizers(node)
    return bool(quantizers) and all(user in quantizers or user.target is aten.sym_size.int for user in node.users)


def _swaps(node: Any) -> bool:
    """Whether a node swaps the last two of three axes."""
    if not (isinstance(node, fx.Node) and node.target is aten.transpose.int and value_of(node).ndim == 3):
        return False
    axes: tuple[Any, ...] = node.args[1:3]
    return {axis % 3 for axis in axes} == {1, 2}


def _item(pair: tuple[Any, Any], index: int) -> Any:
    return pair[index]


def _float32(rewritten: GraphRewrite, parameter: fx.Node | None) -> fx.Node | None:
    """The float32 form of a norm's parameter, which is the only one the kernels read."""
    if parameter is None:
        return None
    name = f"float32.{parameter.target}"
    return rewritten.tensor(name, rewritten.exact[str(parameter.target)])
