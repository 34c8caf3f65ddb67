"""Epilogues of the layers: what is added to a layer's output, or multiplied with it, where nothing else reads it."""

from __future__ import annotations

from typing import Any

from torch import fx

from engines.torch_graph.fusions.prologues import RESHAPES, tokens_of_map
from engines.torch_graph.fx_helpers import aten, calls, per_sample, permutes, same_shape, same_size, value_of, vectors
from engines.torch_graph.rewrite import PRODUCTS, GraphRewrite, kernels

PLACES = {argument.name: place for place, argument in enumerate(kernels.conv2d.default._schema.arguments)}  # the same for linear
EPILOGUE = ("sample_bias", "gate", "residual", "saturate")  # in the order in which the kernels apply them
LARGEST_FLOAT16 = 65504


def fuse_sample_bias(rewritten: GraphRewrite) -> None:
    """Move the addition of one vector for each sample, such as a ResNet's time embedding, into the epilogue of the layer it is added to."""
    for add in calls(rewritten.graph, aten.add.Tensor):
        if not add.kwargs:
            _take_vectors(rewritten, add, "sample_bias")


def fuse_gate(rewritten: GraphRewrite) -> None:
    """Move the product with one vector for each sample, a transformer's gate, into the epilogue of the layer whose output it scales."""
    for mul in calls(rewritten.graph, aten.mul.Tensor):
        _take_vectors(rewritten, mul, "gate")


def fuse_saturation(rewritten: GraphRewrite) -> None:
    """Move a clip to float16's finite values, as diffusers' transformers have behind a block, into the epilogue in front of it."""
    for clip in (*calls(rewritten.graph, aten.clip.default), *calls(rewritten.graph, aten.clamp.default)):
        product = clip.args[0]
        if clip.args[1:] == (-LARGEST_FLOAT16, LARGEST_FLOAT16) and accepts(product, "saturate"):
            _replace(rewritten, clip, product, "saturate", True)


def _take_vectors(rewritten: GraphRewrite, node: Any, name: str) -> None:
    for product, other in (node.args, node.args[::-1]):
        if not accepts(product, name) or product is other or per_sample(other, product) is None or value_of(other).dtype != rewritten.dtype:
            continue
        with rewritten.graph.inserting_before(node):
            columns = vectors(rewritten.graph, other)
        _replace(rewritten, node, product, name, columns)
        return


def accepts(product: Any, name: str) -> bool:
    """Whether a node is a layer's output with one reader, and its epilogue has nothing yet at, or behind, the operand of this name."""
    if not (isinstance(product, fx.Node) and product.target in PRODUCTS and len(product.users) == 1):
        return False
    return not any(product.args[PLACES[later]] for later in EPILOGUE[EPILOGUE.index(name) :])


def _replace(rewritten: GraphRewrite, node: Any, product: Any, name: str, operand: Any) -> None:
    """Replace `node`, which reads `product` and nothing else does, by the product with one more operand of its epilogue."""
    with rewritten.graph.inserting_before(node):
        fused = with_operand(rewritten, product, name, operand)
    fused.meta = dict(node.meta)
    node.replace_all_uses_with(fused)
    rewritten.graph.erase_node(node)
    rewritten.graph.erase_node(product)


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
            if chain is None:
                _replace(rewritten, add, product, "residual", other)
                break
            with rewritten.graph.inserting_before(add):
                fused = with_operand(rewritten, product, "residual", tokens_of_map(rewritten, other))
                fused.meta = dict(product.meta)
                for view in chain[1:]:
                    meta = dict(view.meta)
                    fused = rewritten.graph.call_function(view.target, (fused, *view.args[1:]))
                    fused.meta = meta
            add.replace_all_uses_with(fused)
            for node in (add, *reversed(chain)):
                rewritten.graph.erase_node(node)
            break


def with_operand(rewritten: GraphRewrite, product: Any, operand: str, value: Any) -> Any:
    """A layer's product with one more operand of its epilogue, beside it in the graph."""
    place = PLACES[operand]
    fused = rewritten.graph.call_function(product.target, (*product.args[:place], value, *product.args[place + 1 :]))
    for name, node in rewritten.products.items():
        if node is product:
            rewritten.products[name] = fused
    return fused


def _takes_residual(rewritten: GraphRewrite, product: Any, other: Any, summand: Any) -> bool:
    """Whether a layer's output, of which `summand` is a view or itself, is read by one addition only, of a value of the same shape and type."""
    return accepts(product, "residual") and same_summands(rewritten, summand, other)


def same_summands(rewritten: GraphRewrite, summand: Any, other: Any) -> bool:
    """Whether two different values have one shape, whatever the batch, and the second the type between the sites."""
    if not (isinstance(summand, fx.Node) and isinstance(other, fx.Node)) or summand is other:
        return False
    return same_shape(summand, other) and value_of(other).dtype == rewritten.dtype


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
