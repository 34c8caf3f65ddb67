"""Rewrite each site of a float graph as an integer layer with its scale tables as lookups in the graph.

    row = Gather(row_of_timestep, Clip(Cast(Round(timestep))))                                        once, [B]
    x -> Cast f32 -> Mul Gather(1/s, row) -> Max, Min with Gather(qmin | qmax, row) -> QuantizeLinear(1, int8) -> DequantizeLinear(1)
      -> Conv | MatMul with DequantizeLinear(codes, s_w, axis) -> Mul Gather(s, row) -> Add bias -> Cast back

The scale is applied outside of Q/DQ, whose scales must be constant in TensorRT; docs/design.md, section 4, has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import numpy as np
import onnx_ir as ir
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.quantized_layer import QuantizedLayer
from edm_deploy.export.node_writer import NodeWriter
from edm_deploy.export.trace import SiteNodes
from edm_deploy.network.family import TIMESTEP
from edm_deploy.network.graph_names import ROW_NAME, TableColumn, biased, layer_node, lookup, rescaled
from edm_deploy.numerics.activation_table import ActivationTable
from edm_deploy.numerics.codes import fits_int4, pack_int4

WeightStorage = Literal["int8", "int4"]
INT8_BOUNDS = (-128, 127)


def insert_qdq(model: ir.Model, artifact: Artifact, sites: Mapping[str, SiteNodes], storage: WeightStorage) -> dict[str, str]:
    """Rewrite each site in place.

    Args:
        model: The float graph from `trace`, unoptimised.
        artifact: Codes, scales and tables.
        sites: The nodes of each site, from `find_sites`.
        storage: `int4` stores codes that fit in [-8, 7] as packed INT4 initialisers.

    Returns:
        For each site the name of its Conv or MatMul node, which engines' layer tables and profiles use.
    """
    writer = GraphWriter(model.graph, artifact)
    writer.write_row_lookup()
    return {name: writer.rewrite(name, artifact.sites[name], nodes, storage) for name, nodes in sites.items()}


class GraphWriter(NodeWriter):
    """Insert nodes into one graph: float32, the type within a quantized layer, except codes and rows, whose callers set theirs. Holds the values that sites share: the row of each sample, and quantized inputs."""

    def __init__(self, graph: ir.Graph, artifact: Artifact) -> None:
        super().__init__(graph, ir.DataType.FLOAT)
        self.artifact = artifact
        self.row: ir.Value | None = None  # set by write_row_lookup
        self.first_node = graph[0]
        self.float_dtype = graph.inputs[0].dtype or ir.DataType.FLOAT
        self.quantized: dict[ir.Value, list[tuple[ActivationTable, ir.Value]]] = {}
        self.one = self.constant("quant.one", np.float32(1))
        self.zero = self.constant("quant.zero", np.int8(0))

    def write_row_lookup(self) -> None:
        """Insert `row` [B], each sample's table row, from its timestep, rounded to the nearest integer and clipped to the schedule."""
        rows = self.artifact.row_of_timestep
        timestep = next(value for value in self.graph.inputs if value.name == TIMESTEP.name)
        at = self.first_node
        last = self.constant("row.last_timestep", np.float32(len(rows) - 1))
        value = self.node(at, "Round", [timestep], "row.rounded", like=timestep)
        value = self.node(at, "Clip", [value, self.constant("row.first_timestep", np.float32(0)), last], "row.clipped", like=timestep)
        value = self.node(at, "Cast", [value], "row.index", like=timestep, to=int(ir.DataType.INT64))
        value.type = ir.TensorType(ir.DataType.INT64)
        # int32: half the size of int64, and supported by every backend's Gather.
        table = self.constant("row.of_timestep", rows.numpy())
        self.row = self.node(at, "Gather", [table, value], ROW_NAME, like=timestep, axis=0)
        self.row.type = ir.TensorType(ir.DataType.INT32)

    def rewrite(self, name: str, site: QuantizedLayer, nodes: SiteNodes, storage: WeightStorage) -> str:
        """Replace one site's float nodes by its integer form; returns the name of the layer's node."""
        at = nodes.dead[-1]
        x = nodes.x if site.activation is None else self._quantized_input(name, site.activation, nodes.x, at)
        if site.activation is None:
            x = self.cast(at, x, ir.DataType.FLOAT, f"{name}/x_f32")
        weight = self._weight(at, name, site, storage, transpose=nodes.node.op_type != "Conv")
        op = "Conv" if nodes.node.op_type == "Conv" else "MatMul"
        value = self.node(at, op, [x, weight], layer_node(name), like=nodes.y)
        layer = value.producer()
        assert layer is not None
        if op == "Conv":
            layer.attributes.update(nodes.node.attributes)
        if site.activation is not None:
            scale = self._lookup(at, name, "scale", site.activation.scale, _rank(nodes.x))
            value = self.node(at, "Mul", [value, scale], rescaled(name), like=nodes.y)
        if (bias := self.artifact.params.get(f"{name}.bias")) is not None:
            # After the Mul: the layer computes on x / s, so that a bias added before would be scaled too.
            shape = (1, -1, 1, 1) if op == "Conv" else (-1,)
            value = self.node(
                at, "Add", [value, self.constant(f"{name}.bias_f32", bias.numpy().reshape(shape))], biased(name), like=nodes.y
            )
        value = self.cast(at, value, self.float_dtype, f"{name}/y")
        self.replace(nodes, value)
        return layer_node(name)

    def replace(self, nodes: SiteNodes, value: ir.Value) -> None:
        """Replace a site's output by `value` and remove its float nodes."""
        old = nodes.y
        if old.is_graph_output():
            # The graph's output keeps its name.
            value.name, old.name = old.name, f"{old.name}.float"
            value.shape, value.type = old.shape, old.type
        ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
        for node in reversed(nodes.dead):
            self.graph.remove(node, safe=True)

    def _quantized_input(self, name: str, table: ActivationTable, x: ir.Value, at: ir.Node) -> ir.Value:
        """Quantize `x` and dequantize its codes; sites with the same input and equal tables (q, k and v) share the result."""
        for other, value in self.quantized.get(x, []):
            if other.equals(table):
                return value
        rank = _rank(x)
        value = self.cast(at, x, ir.DataType.FLOAT, f"{name}/x_f32")
        value = self.node(at, "Mul", [value, self._lookup(at, name, "inv_scale", table.inv_scale, rank)], f"{name}/scaled", like=x)
        value = self._clipped(at, name, table, value, rank)
        value = self.node(at, "QuantizeLinear", [value, self.one, self.zero], f"{name}/codes", like=x)
        value.type = ir.TensorType(ir.DataType.INT8)
        value = self.node(at, "DequantizeLinear", [value, self.one, self.zero], f"{name}/x_dq", like=x)
        self.quantized.setdefault(x, []).append((table, value))
        return value

    def _clipped(self, at: ir.Node, name: str, table: ActivationTable, value: ir.Value, rank: int) -> ir.Value:
        """Clip to the bounds: constants where all rows are equal, lookups otherwise, nothing where QuantizeLinear saturates at the same bound."""
        for op, column, saturation in (("Max", table.qmin, INT8_BOUNDS[0]), ("Min", table.qmax, INT8_BOUNDS[1])):
            if bool((column == saturation).all()):
                continue
            bound = self._lookup(at, name, "qmin" if op == "Max" else "qmax", column.float(), rank)
            value = self.node(at, op, [value, bound], f"{name}/{op.lower()}", like=value)
        return value

    def _lookup(self, at: ir.Node, name: str, what: TableColumn, column: Tensor, rank: int) -> ir.Value:
        """`column[row]` as [B, 1, ...] of `rank` dimensions; a scalar constant where all rows are equal."""
        if bool((column == column[0]).all()):
            return self.constant(f"{name}.{what}", np.float32(column[0].item()))
        table = self.constant(f"{name}.{what}", column.numpy().astype(np.float32).reshape(-1, *[1] * (rank - 1)))
        assert self.row is not None and self.row.shape is not None
        value = self.node(at, "Gather", [table, self.row], lookup(name, what), axis=0)
        value.shape = ir.Shape([self.row.shape[0], *[1] * (rank - 1)])
        return value

    def _weight(self, at: ir.Node, name: str, site: QuantizedLayer, storage: WeightStorage, *, transpose: bool) -> ir.Value:
        """The weight's codes, dequantized per output channel; those of a Linear are stored as MatMul reads them, [Cin, Cout]."""
        codes = site.codes.t() if transpose else site.codes
        packed = storage == "int4" and fits_int4(codes)
        dtype, shape, label = ir.DataType.INT4 if packed else ir.DataType.INT8, ir.Shape(codes.shape), f"{name}.weight_codes"

        def make() -> ir.TensorProtocol:
            if packed:
                return ir.PackedTensor(pack_int4(codes).numpy(), dtype=dtype, shape=shape, name=label)
            return ir.tensor(codes.contiguous().numpy(), name=label)

        # Lazy: transposed and packed when it is written, without keeping the result.
        tensor = ir.LazyTensor(make, dtype=dtype, shape=shape, name=label)
        scale = self.constant(f"{name}.weight_scale", site.weight_scale.numpy())
        value = self.node(at, "DequantizeLinear", [self.initializer(tensor), scale], f"{name}/weight", axis=1 if transpose else 0)
        value.shape = ir.Shape(codes.shape)
        return value

    def cast(self, at: ir.Node, value: ir.Value, dtype: ir.DataType, output: str) -> ir.Value:
        """Cast `value` to `dtype`. The tracer gives some helper nodes no type; theirs is the graph's."""
        if (value.dtype or self.float_dtype) == dtype:
            return value
        value = self.node(at, "Cast", [value], output, like=value, to=int(dtype))
        value.type = ir.TensorType(dtype)
        return value


def _rank(value: ir.Value) -> int:
    assert value.shape is not None, f"{value.name} has no shape"
    return len(value.shape)


def remove_float_weights(graph: ir.Graph, sites: Iterable[str]) -> None:
    """Remove the initialisers of float weights and biases that are no longer read."""
    for name in sites:
        for leaf in ("weight", "bias"):
            value = graph.initializers.get(f"{name}.{leaf}")
            if value is not None and not value.uses():
                graph.initializers.pop(f"{name}.{leaf}")
