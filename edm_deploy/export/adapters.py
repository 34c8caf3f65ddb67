"""Insert adapter branches into a float graph: their weights, and the weight of each rank slot by sample, are graph inputs.

    x -> Conv | MatMul with lora.<site>.down -> Mul lora.scale -> Conv | MatMul with lora.<site>.up -> Add to the site's output

The branch reads the layer's input before the quantizer, in the graph's floating-point type.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from edm_deploy.export.node_writer import NodeWriter
from edm_deploy.export.trace import SiteNodes
from edm_deploy.network.adapter_inputs import SLOT_SCALES, AdapterInputs, down_input, up_input
from edm_deploy.network.graph_names import adapted, branch_start


def insert_adapters(model: ir.Model, sites: Mapping[str, SiteNodes], adapters: AdapterInputs) -> None:
    """Add the inputs and the branches to a float graph, in place, before its sites are rewritten.

    Args:
        model: The float graph from `trace`, unoptimised.
        sites: The nodes of each site, from `find_sites`.
        adapters: The branches.
    """
    writer = _BranchWriter(model.graph, adapters)
    for name in adapters.layers:
        writer.insert(name, sites[name])


class _BranchWriter(NodeWriter):
    """Insert branches into one graph. Holds the inputs, and the slots' weights in the shapes that layers of other ranks need."""

    def __init__(self, graph: ir.Graph, adapters: AdapterInputs) -> None:
        super().__init__(graph, graph.inputs[0].dtype or ir.DataType.FLOAT)
        self.inputs = {
            declared.name: ir.Value(name=declared.name, shape=ir.Shape(declared.dims), type=ir.TensorType(self.dtype))
            for declared in adapters.inputs
        }
        self.graph.inputs.extend(self.inputs.values())
        self.scales: dict[tuple[int, ...], ir.Value] = {}
        self.first_node = graph[0]

    def insert(self, name: str, nodes: SiteNodes) -> None:
        """Add the branch of one site to its output."""
        at = nodes.dead[-1]
        conv = nodes.node.op_type == "Conv"
        x, down, up = nodes.x, self.inputs[down_input(name)], self.inputs[up_input(name)]
        if x.dtype not in (None, self.dtype):
            x = self.node(at, "Cast", [x], f"{name}/lora_x", like=x, to=int(self.dtype))
        if not conv:
            down, up = (self.node(at, "Transpose", [weight], f"{weight.name}_t", perm=[1, 0]) for weight in (down, up))
        low = self.node(at, "Conv" if conv else "MatMul", [x, down], branch_start(name))
        if conv and (producer := low.producer()) is not None:
            geometry = {key: value for key, value in nodes.node.attributes.items() if key != "kernel_shape"}
            producer.attributes.update(geometry)
        rank = len(x.shape) if x.shape is not None else 4 if conv else 3
        low = self.node(at, "Mul", [low, self._scale(rank, conv=conv)], f"{name}/lora_scaled")
        value = self.node(at, "Conv" if conv else "MatMul", [low, up], f"{name}/lora_up", like=nodes.y)
        self._add(nodes, value, adapted(name))

    def _add(self, nodes: SiteNodes, value: ir.Value, name: str) -> None:
        """Replace the site's output by its sum with `value`."""
        old = nodes.y
        total = self.node(nodes.dead[-1], "Add", [value, value], name, like=old)
        if old.is_graph_output():
            total.name, old.name = old.name, f"{old.name}.site"
            total.shape, total.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, total, replace_graph_outputs=True)
        node = total.producer()
        assert node is not None
        node.replace_input_with(0, old)

    def _scale(self, rank: int, *, conv: bool) -> ir.Value:
        """The slots' weights [B, R] as [B, R, 1, 1] for a convolution, [B, 1, ..., R] for a linear layer of an input with `rank` dimensions."""
        axes = (2, 3) if conv else tuple(range(1, rank - 1))
        if axes not in self.scales:
            scale = self.inputs[SLOT_SCALES]
            if axes:
                label = "_".join(map(str, axes))
                where = self.constant(f"lora.axes_{label}", np.array(axes, dtype=np.int64))
                scale = self.node(self.first_node, "Unsqueeze", [scale, where], f"{SLOT_SCALES}_{label}")
            self.scales[axes] = scale
        return self.scales[axes]
