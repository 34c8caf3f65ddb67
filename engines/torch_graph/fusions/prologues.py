"""Prologues of the quantizers: activations and norms whose result is only quantized."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from edm_deploy.numerics.kernel_layout import CHUNK
from engines.torch_graph.fx_helpers import aten, calls, permutes, same_size, value_of
from engines.torch_graph.rewrite import GraphRewrite, kernels

QUANTIZE = kernels.quantize.default
QUANTIZE_BRANCH = kernels.quantize_branch.default  # with the same arguments first
BRANCH_PLACES = {argument.name: place for place, argument in enumerate(QUANTIZE_BRANCH._schema.arguments)}
BITS, ACTIVATION, ROTATION = (BRANCH_PLACES[name] for name in ("bits", "activation", "rotation"))
NORM = BRANCH_PLACES["norm"]
RESHAPES = (aten.reshape.default, aten.flatten.using_ints)


def fuse_concatenation(rewritten: GraphRewrite) -> None:
    """Quantize the parts of a concatenation of tokens' channels that is only quantized, such as FLUX's of attention and MLP, and concatenate codes.

    All but the last part must end with a whole chunk of codes, and a whole block of channels where they are rotated. The codes are the same.
    """
    for node in calls(rewritten.graph, aten.cat.default):
        if "val" not in node.meta:  # of weights or ranks, which the rewrite added
            continue
        parts = node.args[0]
        rank, axis = value_of(node).ndim, (*node.args[1:], 0)[0]
        if rank == 4 or axis % rank != rank - 1 or value_of(node).dtype != rewritten.dtype:
            continue
        if not _feeds_plain_quantizers(node) or _last_size_is_read(node) or not _are_whole_chunks(node, parts):
            continue
        if any(quantize.target is QUANTIZE_BRANCH for quantize in quantizers(node)):
            continue
        for quantize in quantizers(node):
            with rewritten.graph.inserting_before(quantize):
                each = [rewritten.graph.call_function(QUANTIZE, (part, *quantize.args[1:])) for part in parts]
                replace_codes(rewritten, quantize, rewritten.graph.call_function(aten.cat.default, (each, 3)))
        node.replace_all_uses_with(parts[0])  # the readers of its sizes
        rewritten.graph.erase_node(node)


def _are_whole_chunks(node: Any, parts: Any) -> bool:
    readers = quantizers(node)
    widths = [value_of(part).shape[-1] for part in parts]
    return all(
        isinstance(width, int) and width * quantize.args[BITS] % (8 * CHUNK) == 0 and width % (quantize.args[ROTATION] or 1) == 0
        for width in widths[:-1]
        for quantize in readers
    )


def fuse_activation(rewritten: GraphRewrite) -> None:
    """Move a SiLU or GELU whose result is only quantized into the quantizers' prologue."""
    for node in (*calls(rewritten.graph, aten.silu.default), *calls(rewritten.graph, aten.gelu.default)):
        x = node.args[0]
        if _feeds_plain_quantizers(node) and value_of(x).dtype == rewritten.dtype:
            _activate(rewritten, node, x, _activation_of(node))


def fuse_geglu(rewritten: GraphRewrite) -> None:
    """Move the product of a layer's first half of channels and the GELU of its second half into the quantizers' prologue."""
    for node in calls(rewritten.graph, aten.mul.Tensor):
        for values, activated in (node.args, node.args[::-1]):
            y = _gated(values, activated)
            if y is None or not _feeds_plain_quantizers(node) or value_of(y).dtype != rewritten.dtype or _last_size_is_read(node):
                continue
            _activate(rewritten, node, y, "geglu")
            break


def _activation_of(node: Any) -> str:
    if node.target is aten.silu.default:
        return "silu"
    return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"


def _activate(rewritten: GraphRewrite, node: Any, x: Any, activation: str) -> None:
    for quantize in quantizers(node):
        quantize.args = (x, *quantize.args[1:ACTIVATION], activation, *quantize.args[ACTIVATION + 1 :])
    node.replace_all_uses_with(x)  # the readers of its sizes
    rewritten.graph.erase_node(node)


def _gated(values: Any, activated: Any) -> Any | None:
    """The tensor [B, ..., 2C] of which `values` is the first half and `activated` the GELU of the second, where nothing else reads the GELU."""
    if not (isinstance(activated, fx.Node) and activated.target is aten.gelu.default and len(activated.users) == 1):
        return None
    if _activation_of(activated) != "gelu":
        return None
    halves = [_half(each) for each in (values, activated.args[0])]
    if halves[0] is None or halves[1] is None or halves[0][0] is not halves[1][0] or (halves[0][1], halves[1][1]) != (0, 1):
        return None
    return halves[0][0].args[0]


def _half(node: Any) -> tuple[Any, int] | None:
    """(chunk, index) of one of two chunks of the last axis of a tensor that is no map."""
    if not (isinstance(node, fx.Node) and node.target is operator.getitem):
        return None
    chunk: Any = node.args[0]
    index: Any = node.args[1]
    if not isinstance(chunk, fx.Node) or chunk.target is not aten.chunk.default:
        return None
    arguments: tuple[Any, ...] = (*chunk.args[1:], 0)
    rank, (count, axis) = value_of(chunk.args[0]).ndim, arguments[:2]
    return (chunk, index) if count == 2 and axis % rank == rank - 1 and rank != 4 and value_of(chunk.args[0]).shape[-1] % 2 == 0 else None


def _last_size_is_read(node: Any) -> bool:
    rank = value_of(node).ndim
    return any(user.target is aten.sym_size.int and user.args[1] % rank == rank - 1 for user in node.users)


def fuse_group_norm(rewritten: GraphRewrite) -> None:
    """Split a group norm whose result is only quantized: statistics in one kernel, normalization and affine part while quantizing."""
    for norm in calls(rewritten.graph, aten.group_norm.default):
        x, y, tokens = norm.args[0], norm, False
        if value_of(x).ndim == 3:  # attention: [B, C, L] between two transposes of [B, L, C]
            y = next(iter(norm.users))
            if len(norm.users) > 1 or not (_swaps(x) and _swaps(y)):
                continue
            x = x.args[0]
        elif (as_tokens := _tokens_of(norm)) is not None:  # a map [B, C, H, W] that is read as [B, HW, C]
            y, tokens = as_tokens, True
        if feeds_quantizers(y) and value_of(x).dtype == rewritten.dtype and not any(quantize.args[ROTATION] for quantize in quantizers(y)):
            _norm_into(rewritten, norm, x, quantizers(y), tokens=tokens)
            if tokens:
                norm.replace_all_uses_with(x)  # the tokens, of which only the sizes are read
            else:
                y.replace_all_uses_with(x)  # the readers of its sizes


def _norm_into(rewritten: GraphRewrite, norm: Any, x: Any, quantizers: list[Any], *, tokens: bool) -> None:
    groups, gamma, beta, eps = (*norm.args[1:5], None, None, 1e-5)[:4] if len(norm.args) < 5 else norm.args[1:5]
    with rewritten.graph.inserting_before(norm):
        stats = rewritten.graph.call_function(kernels.group_stats.default, (x, groups, eps))
        mean, rstd = (rewritten.graph.call_function(item_of, (stats, index)) for index in (0, 1))
        gamma, beta = (float32(rewritten, column) for column in (gamma, beta))
    for quantize in quantizers:
        with rewritten.graph.inserting_before(quantize):
            if quantize.target is QUANTIZE_BRANCH:
                source = tokens_of_map(rewritten, x) if tokens else x
                norm_operands = ("group", mean, rstd, gamma, beta, None, None, groups, 0.0)
                replace_codes(
                    rewritten, quantize, rewritten.graph.call_function(QUANTIZE_BRANCH, (source, *quantize.args[1:NORM], *norm_operands))
                )
                continue
            fused = rewritten.graph.call_function(
                kernels.quantize_normed.default, (x, mean, rstd, gamma, beta, groups, *quantize.args[1:ROTATION])
            )
            if tokens:  # codes [B, H, W, Cb] as [B, HW, 1, Cb]
                fused = rewritten.graph.call_function(aten.flatten.using_ints, (fused, 1, 2))
                fused = rewritten.graph.call_function(aten.unsqueeze.default, (fused, 2))
            replace_codes(rewritten, quantize, fused)


def tokens_of_map(rewritten: GraphRewrite, x: Any) -> Any:
    """A map [B, C, H, W] as [B, HW, C]: a view where it is channels last."""
    last = rewritten.graph.call_function(aten.permute.default, (x, [0, 2, 3, 1]))
    return rewritten.graph.call_function(aten.flatten.using_ints, (last, 1, 2))


def _tokens_of(node: Any) -> Any | None:
    """The tokens [B, HW, C] of a map [B, C, H, W], where nothing else reads the map."""
    if value_of(node).ndim != 4 or len(node.users) != 1:
        return None
    last = next(iter(node.users))
    if not (permutes(last, (0, 2, 3, 1)) and len(last.users) == 1):
        return None
    tokens = next(iter(last.users))
    if tokens.target not in RESHAPES or value_of(tokens).ndim != 3:
        return None
    (batch, _, channels), shape = value_of(tokens).shape, value_of(last).shape
    return tokens if same_size(shape[0], batch) and same_size(shape[3], channels) else None


def replace_codes(rewritten: GraphRewrite, quantize: Any, codes: Any) -> None:
    """Let the readers of a quantizer, and the record of the sites' codes, have other codes in its place."""
    for name, old in rewritten.codes.items():
        if old is quantize:
            rewritten.codes[name] = codes
    quantize.replace_all_uses_with(codes)
    rewritten.graph.erase_node(quantize)


def quantizers(node: Any) -> list[Any]:
    """The quantizers that read a value."""
    return [user for user in node.users if user.target in (QUANTIZE, QUANTIZE_BRANCH) and user.args[0] is node]


def feeds_quantizers(node: Any) -> bool:
    """Whether a value is quantized, and otherwise only its sizes are read."""
    reading = quantizers(node)
    return bool(reading) and all(user in reading or user.target is aten.sym_size.int for user in node.users)


def _feeds_plain_quantizers(node: Any) -> bool:
    """Likewise, and the quantizers have no activation of their own."""
    return feeds_quantizers(node) and all(quantize.args[ACTIVATION] == "none" for quantize in quantizers(node))


def _swaps(node: Any) -> bool:
    """Whether a node swaps the last two of three axes."""
    if not (isinstance(node, fx.Node) and node.target is aten.transpose.int and value_of(node).ndim == 3):
        return False
    axes: tuple[Any, ...] = node.args[1:3]
    return {axis % 3 for axis in axes} == {1, 2}


def item_of(pair: tuple[Any, Any], index: int) -> Any:
    """One of an operator's two results."""
    return pair[index]


def float32(rewritten: GraphRewrite, parameter: fx.Node | None) -> fx.Node | None:
    """The float32 form of a norm's parameter, which is the only one the kernels read."""
    if parameter is None:
        return None
    name = f"float32.{parameter.target}"
    return rewritten.tensor(name, rewritten.exact[str(parameter.target)])
