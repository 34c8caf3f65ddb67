"""Keep scale tables and the timestep in float32 in OpenVINO's bfloat16 mode.

OpenVINO rounds the result of every Gather to bfloat16 before it multiplies a tensor by it, but keeps graph inputs in float32. The tables are therefore
removed from the graph: each looked-up row becomes a graph input, which the session looks up. The nodes from the timestep to its quantizer are marked as
ones that keep float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from torch import Tensor

from edm_deploy.network.graph_names import ROW_NAME, TABLE_COLUMNS, lookup
from edm_deploy.numerics.codes import unpack_int4

KEEP_FLOAT32 = {"name": "precise", "version": "0"}  # OpenVINO's attribute in its graph files; its Python API cannot set it
ENDS_OF_TIMESTEP = ("FakeQuantize", "MatMul", "Convolution")


def scales_to_inputs(ov: Any, model: Any, sites: Iterable[str]) -> dict[str, Tensor]:
    """Replace each lookup by the samples' table rows with a graph input of the same name, float32 [B, 1, ...].

    Args:
        ov: The openvino module.
        model: An ov.Model as read from the exported graph; changed in place.
        sites: Names of the quantized layers.

    Returns:
        The tables, float32 [R, 1, ...], by input name; and `row`, int32 [num_train_timesteps], unless every table is constant.
    """
    tables: dict[str, Tensor] = {}
    inputs = []
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    names = {lookup(site, column) for site in sites for column in TABLE_COLUMNS}
    for name in [name for name in nodes if name in names]:
        if ROW_NAME not in tables:
            tables[ROW_NAME] = _gathered(nodes[ROW_NAME]).reshape(-1)
        looked_up = ov.op.Parameter(ov.Type.f32, nodes[name].get_output_partial_shape(0))
        looked_up.set_friendly_name(name)
        looked_up.output(0).set_names({name})
        nodes[name].output(0).replace(looked_up.output(0))
        tables[name] = _gathered(nodes[name])
        inputs.append(looked_up)
    model.add_parameters(inputs)
    model.validate_nodes_and_infer_types()
    return tables


def _gathered(gather: Any) -> Tensor:
    """The table that a Gather reads."""
    return torch.from_numpy(gather.input_value(0).get_node().data.copy())


def widen_int4(ov: Any, model: Any) -> None:
    """Replace INT4 constants by INT8 ones of the same values: OpenVINO has no integer kernel on INT4 weights and would compute in floating point."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i4:
            packed = torch.from_numpy(node.data.view("uint8").reshape(-1).copy())
            codes = unpack_int4(packed, tuple(node.get_output_shape(0))).numpy()
            wide = ov.op.Constant(codes)
            wide.set_friendly_name(node.get_friendly_name())
            node.output(0).replace(wide.output(0))
    model.validate_nodes_and_infer_types()


def timestep_path(model: Any, name: str) -> set[str]:
    """Names of the nodes that compute on the timestep before it is quantized or multiplied with weights."""
    path: set[str] = set()
    for parameter in model.get_parameters():
        if parameter.get_friendly_name() == name:
            path.update(_downstream(parameter))
    return path


def _downstream(start: Any) -> Iterator[str]:
    pending, visited = [start], set()
    while pending:
        users = [target.get_node() for output in pending.pop().outputs() for target in output.get_target_inputs()]
        for node in users:
            if node.get_friendly_name() not in visited and node.get_type_name() != "Result":
                visited.add(node.get_friendly_name())
                yield node.get_friendly_name()
                if node.get_type_name() not in ENDS_OF_TIMESTEP:
                    pending.append(node)


def keep_float32(xml: Path, names: set[str]) -> None:
    """Mark layers of a graph file, by name, as ones that keep float32 when the rest is computed in bfloat16."""
    tree = ElementTree.parse(xml)
    for layer in tree.iter("layer"):
        if layer.get("name") in names:
            info = layer.find("rt_info")
            ElementTree.SubElement(ElementTree.SubElement(layer, "rt_info") if info is None else info, "attribute", KEEP_FLOAT32)
    tree.write(xml, encoding="utf-8", xml_declaration=True)
