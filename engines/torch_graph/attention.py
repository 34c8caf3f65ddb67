"""Replace attention of torch by ours, with 8-bit queries and keys, in a rewritten graph."""

from __future__ import annotations

from typing import Any

from torch import fx

from engines.kernels.attention.operands import supports
from engines.torch_graph.fx_helpers import aten, value_of
from engines.torch_graph.rewrite import GraphRewrite, kernels

SDPA = aten.scaled_dot_product_attention.default
# Below it the two kernels that encode the keys take as long as 8-bit products gain: expected on an RTX 3090, by engines/performance.
LEAST_KEYS = 128


def attention_in_int8(rewritten: GraphRewrite) -> list[str]:
    """Replace each attention that our kernels compute and that is expected to gain from them.

    It stays torch's with a mask, with dropout, where it is causal or heads are grouped, with heads that the kernels do not have, in another type than the graph's,
    and where keys are few or their number depends on another input than that of the queries: attention to a text.

    Returns:
        Names of the nodes that were replaced.
    """
    found: list[Any] = [node for node in rewritten.graph.nodes if node.op == "call_function" and node.target is SDPA]
    replaced = []
    for node in found:
        given = dict(zip((argument.name for argument in SDPA._schema.arguments), node.args, strict=False)) | node.kwargs
        query, key, value = given["query"], given["key"], given["value"]
        if not _is_plain(given) or not _gains(rewritten, query, key, value):
            continue
        with rewritten.graph.inserting_before(node):
            ours = rewritten.graph.call_function(kernels.attention_s8.default, (query, key, value, given.get("scale")))
        ours.meta = dict(node.meta)
        node.replace_all_uses_with(ours)
        rewritten.graph.erase_node(node)
        replaced.append(node.name)
    return replaced


def _is_plain(given: dict[str, Any]) -> bool:
    masked = given.get("attn_mask") is not None or given.get("is_causal", False)
    return not masked and not given.get("dropout_p", 0.0) and not given.get("enable_gqa", False)


def _gains(rewritten: GraphRewrite, query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    tensors = [value_of(node) for node in (query, key, value)]
    if any(tensor.ndim != 4 or tensor.dtype != rewritten.dtype for tensor in tensors):
        return False
    width, tokens, keys = tensors[0].shape[3], tensors[0].shape[2], tensors[1].shape[2]
    if not isinstance(width, int) or not supports(width) or any(tensor.shape[3] != width for tensor in tensors):
        return False
    # Sizes may be symbols, of which a comparison would be a guard: the same words are the same size.
    return keys >= LEAST_KEYS if isinstance(keys, int) else str(keys) == str(tokens)
