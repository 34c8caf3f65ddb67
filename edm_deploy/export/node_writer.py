"""Insert nodes and initialisers into a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class NodeWriter:
    """Insert nodes into one graph.

    Args:
        graph: Changed in place.
        dtype: Type of the nodes' outputs; callers set another one afterwards.
    """

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self.graph = graph
        self.dtype = dtype

    def constant(self, name: str, array: np.ndarray[Any, Any] | np.generic) -> ir.Value:
        """An initialiser of this name, which is created on first use."""
        if name in self.graph.initializers:
            return self.graph.initializers[name]
        return self.initializer(ir.tensor(np.asarray(array), name=name))

    def initializer(self, tensor: ir.TensorProtocol) -> ir.Value:
        """Add a tensor as an initialiser of the same name."""
        shape = ir.Shape(tensor.shape)  # type: ignore[arg-type]  # an initialiser's shape is all numbers
        value = ir.Value(name=tensor.name, shape=shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.initializers.add(value)
        return value

    def node(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value],
        output: str,
        like: ir.Value | None = None,
        **attributes: int | float | Sequence[int],
    ) -> ir.Value:
        """Insert a node before another; returns its output, with the shape of `like`."""
        node = ir.node(op, inputs, attributes=attributes, name=output)
        value = node.outputs[0]
        value.name, value.type = output, ir.TensorType(self.dtype)
        if like is not None:
            value.shape = like.shape
        self.graph.insert_before(before, node)
        return value
