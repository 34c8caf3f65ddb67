from __future__ import annotations

import numpy as np
import onnx_ir as ir

from edm_deploy.export.node_writer import NodeWriter


def graph_of_one_node():
    x = ir.Value(name="x", shape=ir.Shape(["batch", 3]), type=ir.TensorType(ir.DataType.FLOAT16))
    relu = ir.node("Relu", [x], name="relu")
    return ir.Graph([x], [relu.outputs[0]], nodes=[relu], opset_imports={"": 21})


def test_a_node_is_inserted_before_another_with_the_writers_type():
    graph = graph_of_one_node()
    value = NodeWriter(graph, ir.DataType.FLOAT16).node(
        graph[0], "Transpose", [graph.inputs[0]], "moved", like=graph.inputs[0], perm=[1, 0]
    )
    assert [node.name for node in graph] == ["moved", "relu"]
    assert (value.name, value.dtype, value.shape) == ("moved", ir.DataType.FLOAT16, graph.inputs[0].shape)
    assert list(graph[0].attributes["perm"].as_ints()) == [1, 0]


def test_a_constant_of_one_name_is_created_once():
    graph = graph_of_one_node()
    writer = NodeWriter(graph, ir.DataType.FLOAT)
    first = writer.constant("one", np.float32(1))
    assert writer.constant("one", np.float32(2)) is first
    assert (first.dtype, float(first.const_value.numpy())) == (ir.DataType.FLOAT, 1.0)
