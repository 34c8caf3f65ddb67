"""Adapter branches in a rewritten graph: two thin products in torch beside each site, added to its output. Their weights are inputs of the graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from edm_deploy.network.adapter_inputs import SLOT_SCALES, AdapterInputs, conv_low, down_input, linear_low, up_input
from engines.torch_graph.fx_helpers import aten
from engines.torch_graph.rewrite import GraphRewrite


def add_adapters(rewritten: GraphRewrite, layers: Mapping[str, Any], adapters: AdapterInputs) -> dict[str, fx.Node]:
    """Add the branches, before any fusion. A later fusion moves a branch's sum into the epilogue of its site's kernel.

    Args:
        rewritten: Changed in place; `inputs` and `products` of the sites stay true.
        layers: The model's layers by name, for the geometry of convolutions.
        adapters: The branches.

    Returns:
        The placeholders by name of the input, in order. They follow those of the denoiser.
    """
    graph = rewritten.graph
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    placeholders: dict[str, fx.Node] = {}
    for declared in adapters.inputs:
        with graph.inserting_after(last):
            placeholders[declared.name] = last = graph.placeholder(declared.name.replace(".", "_"))
        if declared.name != SLOT_SCALES:  # whose first size is that of the batch
            last.meta["val"] = torch.empty([int(size) for size in declared.dims], dtype=rewritten.dtype, device="meta")
    casts: dict[str, fx.Node] = {}
    for site in [name for name in rewritten.products if name in adapters.layers]:
        _add(rewritten, site, layers[site], placeholders, casts)
    return placeholders


def _add(rewritten: GraphRewrite, site: str, layer: Any, placeholders: Mapping[str, fx.Node], casts: dict[str, fx.Node]) -> None:
    graph, product, x = rewritten.graph, rewritten.products[site], rewritten.inputs[site]
    with graph.inserting_after(product):
        total: Any = graph.call_function(aten.add.Tensor, (product, product))
    total.meta = dict(product.meta)
    product.replace_all_uses_with(total)
    with graph.inserting_before(total):
        x = rewritten.cast(x)
        down, up, scale = (_cast(rewritten, name, placeholders, casts) for name in (down_input(site), up_input(site), SLOT_SCALES))
        if layer.weight.ndim == 4:
            low = rewritten.call(conv_low, x, down, scale, list(layer.stride), list(layer.padding), list(layer.dilation))
            branch = rewritten.call(aten.conv2d.default, low, up)
        else:
            branch = rewritten.call(aten.linear.default, rewritten.call(linear_low, x, down, scale), up)
    branch.meta = dict(product.meta)
    total.args = (product, branch)
    rewritten.added.add(product)  # a layer without integer kernel reads the site's input itself
    for name, value in rewritten.inputs.items():
        if value is product:
            rewritten.inputs[name] = total
    rewritten.products[site] = total


def _cast(rewritten: GraphRewrite, name: str, placeholders: Mapping[str, fx.Node], casts: dict[str, fx.Node]) -> fx.Node:
    """An input in the type between the sites; it arrives in that of the graph's inputs."""
    if name not in casts:
        with rewritten.graph.inserting_after(list(placeholders.values())[-1]):
            casts[name] = rewritten.graph.call_function(aten.to.dtype, (placeholders[name], rewritten.dtype))
        casts[name].meta = dict(placeholders[name].meta)
    return casts[name]
