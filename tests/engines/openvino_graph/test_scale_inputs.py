from xml.etree import ElementTree

import pytest
import torch

from edm_deploy.network.graph_names import ROW_NAME, TABLE_COLUMNS, lookup
from edm_deploy.numerics.codes import pack_int4
from engines.openvino_graph.core import core
from engines.openvino_graph.scale_inputs import keep_float32, scales_to_inputs, timestep_path, widen_int4

ov = pytest.importorskip("openvino")
SCALE = lookup("conv", TABLE_COLUMNS[0])


def named(node, name):
    node.set_friendly_name(name)
    node.output(0).set_names({name})
    return node


def looked_up():
    """x times a scale of its timestep's row: float32 [B, 2] of x [B, 2] and timestep [B]."""
    ops = ov.opset13
    x, timestep = named(ops.parameter([-1, 2], ov.Type.f32), "x"), named(ops.parameter([-1], ov.Type.f32), "timestep")
    index = ops.convert(timestep, "i32")
    rows = named(ops.gather(ops.constant(torch.tensor([0, 0, 1], dtype=torch.int32).numpy()), index, 0), ROW_NAME)
    scale = named(ops.gather(ops.constant(torch.tensor([[2.0], [3.0]]).numpy()), rows, 0), SCALE)
    return ov.Model([ops.result(ops.multiply(x, scale))], [x, timestep])


def test_each_lookup_becomes_an_input_and_its_table_is_returned():
    model = looked_up()
    tables = scales_to_inputs(ov, model, ["conv"])
    assert [parameter.get_friendly_name() for parameter in model.get_parameters()] == ["x", "timestep", SCALE]
    assert tables[ROW_NAME].tolist() == [0, 0, 1]
    assert tables[SCALE].tolist() == [[2.0], [3.0]]
    inputs = {"x": torch.ones(2, 2).numpy(), "timestep": torch.zeros(2).numpy(), SCALE: torch.tensor([[5.0], [7.0]]).numpy()}
    assert core(ov).compile_model(model, "CPU")(inputs)[0].tolist() == [[5.0, 5.0], [7.0, 7.0]]


def test_a_graph_without_lookups_is_left_as_it_is():
    x = ov.opset13.parameter([2], ov.Type.f32)
    model = ov.Model([ov.opset13.result(ov.opset13.relu(x))], [x])
    assert scales_to_inputs(ov, model, ["conv"]) == {}
    assert len(model.get_parameters()) == 1


def test_int4_constants_become_int8_ones_of_the_same_values():
    codes = torch.tensor([[-8, 7, 0], [1, -1, 3]], dtype=torch.int8)
    packed = ov.Tensor(pack_int4(codes).numpy(), ov.Shape([2, 3]), ov.Type.i4)
    constant = named(ov.op.Constant(packed), "weight")
    model = ov.Model([ov.opset13.result(ov.opset13.convert(constant, "f32"))], [])
    widen_int4(ov, model)
    (wide,) = (node for node in model.get_ordered_ops() if node.get_type_name() == "Constant")
    assert (wide.get_friendly_name(), wide.get_element_type()) == ("weight", ov.Type.i8)
    assert wide.data.tolist() == codes.tolist()


def test_the_path_of_the_timestep_ends_where_it_meets_weights():
    ops = ov.opset13
    timestep = named(ops.parameter([1, 2], ov.Type.f32), "timestep")
    sine = named(ops.sin(timestep), "sine")
    product = named(ops.matmul(sine, ops.constant(torch.ones(2, 2).numpy()), False, False), "product")
    model = ov.Model([ops.result(named(ops.relu(product), "after"))], [timestep])
    assert timestep_path(model, "timestep") == {"sine", "product"}
    assert timestep_path(model, "sample") == set()


def test_named_layers_of_a_graph_file_are_marked_as_precise(tmp_path):
    path = tmp_path / "engine.xml"
    path.write_text('<net><layers><layer name="a"><rt_info/></layer><layer name="b"/><layer name="c"/></layers></net>')
    keep_float32(path, {"a", "b"})
    marked = {layer.get("name"): [info.get("name") for info in layer.iter("attribute")] for layer in ElementTree.parse(path).iter("layer")}
    assert marked == {"a": ["precise"], "b": ["precise"], "c": []}
