"""Tabulate the part of the graph that depends on the timestep alone: the time embedding and its projections in every block.

    t = Clip(timestep);  low = Floor(t)
    features = table[low] + (t - low) * (table[low + 1] - table[low])          float32, one table [num_train_timesteps, concatenated features]
    Split -> Cast -> Reshape: each feature replaces its layers' output

At an integer timestep this is the table's row, bit for bit; between two (Euler's timesteps are fractional) it interpolates linearly. The table has a
row for every training timestep, not only for the calibrated ones, so that it serves any scheduler and any number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.export.trace import find_sites
from edm_deploy.network.family import SAMPLE, TIMESTEP

LARGEST_TABLE = 32 << 20  # values: 64 MiB in float16
LARGEST_GROWTH = 4  # largest size of a table, as a multiple of the weights that it replaces


@dataclass(frozen=True)
class Frontier:
    """The part of a graph that depends on the timestep alone.

    Attributes:
        nodes: The nodes of that part, in order, with the constant nodes that they read.
        values: The values of that part that the rest of the graph reads.
    """

    nodes: tuple[ir.Node, ...]
    values: tuple[ir.Value, ...]


def fold_time(model: ir.Model, artifact: Artifact, site_nodes: Iterable[ir.Node]) -> dict[str, Any]:
    """Replace the part of a graph that depends on the timestep alone by a table lookup, in place.

    Args:
        model: The float graph before simplification; its initialisers need not hold data.
        artifact: The artifact, with the names and weights of the folded layers.
        site_nodes: Nodes of the quantized sites; nothing that depends on one of these is folded.

    Returns:
        The manifest's entry: `layers`, and `table` or, where the table would be too large, `computed`. Empty where the artifact folds nothing.
    """
    if not artifact.folded:
        return {}
    # Either all that depends on the timestep alone, or only up to the folded layers: an adaLN-single adds a table of each block to the output of one
    # layer, which makes it many times as wide.
    ends = [site.y for site in find_sites(model.graph, list(artifact.folded)).values()]
    stop = set(site_nodes)
    frontier = min(find_frontier(model.graph, stop), find_frontier(model.graph, stop, ends), key=_total_width)
    rows = artifact.num_train_timesteps
    widths = [_width(value) for value in frontier.values]
    weights = sum(artifact.params[f"{name}.weight"].numel() for name in artifact.folded)
    layers = list(artifact.folded)
    if (size := rows * sum(widths)) > min(LARGEST_TABLE, LARGEST_GROWTH * max(weights, LARGEST_TABLE // 64)):
        reason = f"a table of {rows} timesteps x {sum(widths)} features would be larger than what it replaces ({weights} weights)"
        return {"layers": layers, "computed": reason}
    features = evaluate(model, frontier, artifact)
    _look_up(model.graph, frontier, features)
    return {"layers": layers, "table": f"{rows} timesteps x {sum(widths)} features, {size * features[0].itemsize / 2**20:.1f} MiB"}


def find_frontier(graph: ir.Graph, stop: set[ir.Node], ends: Iterable[ir.Value] | None = None) -> Frontier:
    """The largest part of a graph that reads only the timestep, constants and the batch size, and no node of `stop`; or its part that `ends` need."""
    timestep = next(value for value in graph.inputs if value.name == TIMESTEP.name)
    timed: set[ir.Value] = {timestep}
    fixed: set[ir.Value] = set(graph.initializers.values())
    part: dict[ir.Node, None] = {}
    for node in graph:
        inputs = [value for value in node.inputs if value is not None]
        if node in stop or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values()):
            continue
        if node.op_type == "Shape" or all(value in fixed for value in inputs):
            # A shape is constant here: while the table is computed, the batch size is its number of rows.
            fixed.update(node.outputs)
        elif all(value in timed or value in fixed for value in inputs):
            timed.update(node.outputs)
        else:
            continue
        part[node] = None
    nodes = tuple(node for node in part if any(output in timed for output in node.outputs))
    if ends is not None:
        last = {value.producer() for value in ends}
        nodes = _with_sources(tuple(node for node in nodes if node in last), dict.fromkeys(nodes))
    values = (output for node in nodes for output in node.outputs)
    read = tuple(value for value in values if value.is_graph_output() or any(use.node not in nodes for use in value.uses()))
    return Frontier(_with_sources(nodes, part), read)


def _with_sources(nodes: tuple[ir.Node, ...], part: Mapping[ir.Node, None]) -> tuple[ir.Node, ...]:
    """`nodes` and all nodes of `part` that they depend on, in the order of `part`."""
    wanted, queue = set(nodes), list(nodes)
    while queue:
        for value in queue.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer in part and producer not in wanted:
                wanted.add(producer)
                queue.append(producer)
    return tuple(node for node in part if node in wanted)


def _total_width(frontier: Frontier) -> int:
    return sum(_width(value) for value in frontier.values)


def _width(value: ir.Value) -> int:
    assert value.shape is not None, f"{value.name} has no shape"
    sizes = list(value.shape)[1:]
    assert all(isinstance(size, int) for size in sizes), f"{value.name} has shape {value.shape}; only its batch may vary"
    return math.prod(size for size in sizes if isinstance(size, int))


def evaluate(model: ir.Model, frontier: Frontier, artifact: Artifact) -> list[np.ndarray[Any, Any]]:
    """The frontier's values at every training timestep, [num_train_timesteps, ...], computed in float32 and then rounded to the graph's type."""
    rows = artifact.num_train_timesteps
    function = _float32_model(model, frontier, artifact)
    sample = next(value for value in model.graph.inputs if value.name == SAMPLE)
    shape = [rows, *(size if isinstance(size, int) else 8 for size in list(sample.shape or ())[1:])]
    feeds = {TIMESTEP.name: np.arange(rows, dtype=np.float32)}
    if any(value.name == SAMPLE for value in function.graph.inputs):
        feeds[SAMPLE] = np.broadcast_to(np.float32(0), shape)  # only its shape is read
    results = ReferenceEvaluator(ir.serde.serialize_model(function)).run(None, feeds)
    dtypes = [(value.dtype or sample.dtype or ir.DataType.FLOAT).numpy() for value in frontier.values]
    for value, result in zip(frontier.values, results, strict=True):
        assert len(result) == rows, f"{value.name} is not one row per sample"
    return [result.astype(dtype) for result, dtype in zip(results, dtypes, strict=True)]


def _float32_model(model: ir.Model, frontier: Frontier, artifact: Artifact) -> ir.Model:
    """The part as a separate model in float32: its inputs are the timestep and the sample (for its shape), its outputs the frontier."""
    values: dict[ir.Value, ir.Value] = {}
    inputs, initializers, nodes = [], [], []

    def copied(value: ir.Value | None) -> ir.Value | None:
        if value is None or value in values:
            return None if value is None else values[value]
        new = ir.Value(name=value.name)
        if value.is_graph_input():
            new.type, new.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
            inputs.append(new)
        else:
            new.const_value = _float32(_data(value, artifact))
            initializers.append(new)
        values[value] = new
        return new

    for node in frontier.nodes:
        attributes = [_float32_attribute(attribute) for attribute in node.attributes.values()]
        copies = [copied(value) for value in node.inputs]
        outputs = [ir.Value(name=output.name) for output in node.outputs]
        values |= dict(zip(node.outputs, outputs, strict=True))
        nodes.append(ir.Node(node.domain, node.op_type, copies, attributes, outputs=outputs, name=node.name, version=node.version))
    results = [values[value] for value in frontier.values]
    graph = ir.Graph(inputs, results, nodes=nodes, initializers=initializers, opset_imports=model.graph.opset_imports, name="time")
    return ir.Model(graph, ir_version=model.ir_version, functions=list(model.functions.values()))


def _data(value: ir.Value, artifact: Artifact) -> np.ndarray[Any, Any]:
    if (parameter := artifact.params.get(str(value.name))) is not None:
        return parameter.numpy()
    assert value.const_value is not None, f"{value.name} has no data"
    return value.const_value.numpy()


def _float32(array: np.ndarray[Any, Any]) -> ir.TensorProtocol:
    return ir.tensor(array.astype(np.float32) if array.dtype == np.float16 else array)


def _float32_attribute(attribute: ir.Attr) -> ir.Attr:
    if attribute.name == "to" and attribute.as_int() == ir.DataType.FLOAT16:
        return ir.AttrInt64("to", int(ir.DataType.FLOAT))
    if attribute.type == ir.AttributeType.TENSOR:
        return ir.AttrTensor(attribute.name, _float32(attribute.as_tensor().numpy()))
    return attribute


def _look_up(graph: ir.Graph, frontier: Frontier, features: list[np.ndarray[Any, Any]]) -> None:
    """Insert the lookup at the start of the graph and remove the part that it replaces."""
    first, rows = graph[0], len(features[0])
    timestep = next(value for value in graph.inputs if value.name == TIMESTEP.name)

    def constant(name: str, data: np.ndarray[Any, Any] | np.generic) -> ir.Value:
        array = np.asarray(data)
        tensor = ir.tensor(array, name=f"time.{name}")
        value = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.initializers.add(value)
        return value

    def node(op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType, dims: list[Any], **attributes: Any) -> ir.Value:
        made = ir.node(op, inputs, attributes=attributes, name=f"time/{name}")
        (value,) = made.outputs
        value.name, value.type, value.shape = f"time/{name}", ir.TensorType(dtype), ir.Shape(dims)
        graph.insert_before(first, made)
        return value

    batch = [timestep.shape[0]] if timestep.shape is not None else ["batch"]
    flat = np.concatenate([feature.reshape(rows, -1) for feature in features], axis=1)
    width, f32, i64 = [*batch, flat.shape[1]], ir.DataType.FLOAT, ir.DataType.INT64
    table = constant("features", flat)
    t = node("Clip", [timestep, constant("first", np.float32(0)), constant("last", np.float32(rows - 1))], "timestep", f32, batch)
    low = node("Floor", [t], "low", f32, batch)
    fraction = node("Sub", [t, low], "fraction", f32, batch)
    high = node(
        "Min",
        [node("Add", [low, constant("one", np.float32(1))], "next", f32, batch), constant("end", np.float32(rows - 1))],
        "high",
        f32,
        batch,
    )
    ends = []
    for name, value in (("low", low), ("high", high)):
        index = node("Cast", [value], f"{name}_index", i64, batch, to=int(i64))
        row = node("Gather", [table, index], f"{name}_features", ir.DataType.from_numpy(flat.dtype), width, axis=0)
        ends.append(row if flat.dtype == np.float32 else node("Cast", [row], f"{name}_f32", f32, width, to=int(f32)))
    slope = node("Sub", [ends[1], ends[0]], "slope", f32, width)
    weight = node("Unsqueeze", [fraction, constant("axis", np.array([1]))], "weight", f32, [*batch, 1])
    value = node("Add", [ends[0], node("Mul", [weight, slope], "step", f32, width)], "features", f32, width)
    sizes = [feature[0].size for feature in features]
    split = ir.node("Split", [value, constant("sizes", np.array(sizes))], attributes={"axis": 1}, num_outputs=len(sizes), name="time/split")
    graph.insert_before(first, split)
    for old, feature, part in zip(frontier.values, features, split.outputs, strict=True):
        part.name, part.type, part.shape = f"time/{old.name}/part", ir.TensorType(f32), ir.Shape([*batch, feature[0].size])
        dims = [*batch, *feature.shape[1:]]
        shaped = node("Reshape", [part, constant(f"{old.name}.shape", np.array([-1, *feature.shape[1:]]))], f"{old.name}/shaped", f32, dims)
        dtype = ir.DataType.from_numpy(feature.dtype)
        new = shaped if dtype == f32 else node("Cast", [shaped], f"{old.name}/value", dtype, dims, to=int(dtype))
        ir.convenience.replace_all_uses_with(old, new)
    for dead in reversed(frontier.nodes):
        if not any(output.uses() or output.is_graph_output() for output in dead.outputs):
            graph.remove(dead, safe=True)
