"""The exported graph with an input and outputs at every site, to compare an engine with the reference one site at a time on the reference's inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.reference import SiteRecord
from edm_deploy.export.onnx import graph_from_artifact, save_graph
from edm_deploy.network.adapter_inputs import AdapterInputs
from edm_deploy.network.family import TIMESTEP, ModelInput
from edm_deploy.network.graph_names import adapted, biased, branch_start, rescaled
from edm_deploy.runtime.manifest import ONNX, TORCH_DTYPES, GraphDtype, Manifest
from edm_deploy.storage.output_directory import new_directory

BEFORE_CODES = ("Max", "Min", "Clip")


def onnx_cut_at_sites(
    artifact: Artifact,
    records: Mapping[str, SiteRecord],
    out: Path | str,
    *,
    dtype: GraphDtype = "fp32",
    adapters: AdapterInputs | None = None,
) -> Manifest:
    """Write an ONNX directory that computes every site separately, with the nodes of the exported graph and without the network between the sites.

    Args:
        artifact: A valid artifact.
        records: The reference's input and output of each site, for their shapes.
        out: Directory to write. Inputs `timestep` and `<site>.x` (float32 in the shape of the record's x; sites with one shared
            quantized input have the input of the first), outputs `<site>.codes` (int8) and `<site>.y` (float32).
        dtype: Floating-point type of the graph that is cut.
        adapters: Adapter branches of the graph, whose outputs are included in `<site>.y`, and whose inputs follow the others.

    Returns:
        The manifest. The directory is built and opened like any other.
    """
    model, site_nodes = graph_from_artifact(artifact, TORCH_DTYPES[dtype], "int8", adapters)
    nodes = {node.name: node for node in model.graph}
    timestep = next(value for value in model.graph.inputs if value.name == TIMESTEP.name)
    branches = [value for value in model.graph.inputs if adapters is not None and value.name in {entry.name for entry in adapters.inputs}]
    read: dict[ir.Node, ir.Value] = {}  # the input of each first node
    inputs: dict[ir.Node, ModelInput] = {}
    cut: list[ir.Value] = []
    outputs: list[ir.Value] = []
    for site, layer_name in site_nodes.items():
        scaled, codes = _start(nodes[layer_name])
        if scaled not in inputs:
            inputs[scaled] = ModelInput(f"{site}.x", "float32", ("batch", *records[site].x.shape[1:]))
            value = ir.Value(name=f"{site}.x", shape=ir.Shape(inputs[scaled].dims), type=ir.TensorType(ir.DataType.FLOAT))
            scaled.replace_input_with(0, value)
            cut.append(value)
            read[scaled] = value
        if branch_start(site) in nodes:
            _read_instead(model.graph, nodes[branch_start(site)], read[scaled], TORCH_DTYPES[dtype])
        last = next(nodes[name] for name in (adapted(site), biased(site), rescaled(site), layer_name) if name in nodes)
        y = last.outputs[0]
        narrow = last.name == adapted(site) and dtype == "fp16"  # the branch is added after the site's output was rounded
        y.type, y.shape = (
            ir.TensorType(ir.DataType.FLOAT16 if narrow else ir.DataType.FLOAT),
            ir.Shape(["batch", *records[site].y.shape[1:]]),
        )
        outputs.append(_output(model.graph, last, y, f"{site}.y"))
        if codes is not None:
            codes.type, codes.shape = ir.TensorType(ir.DataType.INT8), ir.Shape(inputs[scaled].dims)
            producer = codes.producer()
            assert producer is not None
            outputs.append(_output(model.graph, producer, codes, f"{site}.codes"))
    model.graph.inputs[:] = [timestep, *cut, *branches]
    model.graph.outputs[:] = outputs
    passes.RemoveUnusedNodesPass()(model)
    passes.TopologicalSortPass()(model)
    manifest = replace(
        Manifest.of(artifact, site_nodes, kind="onnx", dtype=dtype, weight_storage="int8"),
        inputs=(TIMESTEP, *inputs.values()),
        outputs=tuple(str(value.name) for value in outputs),
        adapters=adapters,
    )
    with new_directory(Path(out), kind=ONNX) as directory:
        return manifest.write(directory, save_graph(model, directory))


def _start(layer: ir.Node) -> tuple[ir.Node, ir.Value | None]:
    """The first node of a site, whose first input is the float32 input, and the codes (None for a weight-only site)."""
    dequantize = _producer(layer)
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return layer, None
    codes = dequantize.inputs[0]
    quantize = _producer(dequantize)
    assert quantize is not None and codes is not None
    node = _producer(quantize)
    while node is not None and node.op_type in BEFORE_CODES:
        node = _producer(node)
    assert node is not None and node.op_type == "Mul", "a quantized input begins with its scaling"
    return node, codes


def _read_instead(graph: ir.Graph, start: ir.Node, value: ir.Value, dtype: torch.dtype) -> None:
    """Let an adapter branch read a site's own input, in the graph's floating-point type."""
    if dtype != torch.float32:
        cast = ir.node("Cast", [value], attributes={"to": int(ir.DataType.FLOAT16)}, name=f"{start.name}_x")
        (narrow,) = cast.outputs
        narrow.name, narrow.type, narrow.shape = f"{start.name}_x", ir.TensorType(ir.DataType.FLOAT16), value.shape
        graph.insert_before(start, cast)
        value = narrow
    start.replace_input_with(0, value)


def _producer(node: ir.Node) -> ir.Node | None:
    value = node.inputs[0]
    return value.producer() if value is not None else None


def _output(graph: ir.Graph, after: ir.Node, value: ir.Value, name: str) -> ir.Value:
    """A graph output as an Identity of `value`: two sites may share one value of codes, which can have only one name."""
    identity = ir.node("Identity", [value], name=name)
    output = identity.outputs[0]
    output.name, output.type, output.shape = name, value.type, value.shape
    graph.insert_after(after, identity)
    return output
