"""Rewrite the float program of a denoiser for the kernels: every quantized layer becomes quantize -> convolve, in one graph that torch runs.

    timestep -> round, clamp -> row_of_timestep[...] -> rows [B] int32                 once
    x -> quantize(rows) -> conv2d | linear (rows, residual) -> y                       per site; sites with the same codes share one quantize

Values between the sites stay in torch, in float16 or bfloat16. A site that no kernel computes keeps exact codes and multiplies in floating point. Redundant
memory-bound operations are fused afterwards, in `fusions/`.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edm_deploy.errors import UnsupportedError
from edm_deploy.network.float_program import MODEL
from edm_deploy.numerics.activation_table import per_sample
from edm_deploy.numerics.kernel_layout import bits_of
from engines.kernels import ops
from engines.torch_graph.fx_helpers import aten, clean, merge_equal, value_of
from engines.torch_graph.packed_layer import PackedLayer, tensor_name

kernels: Any = torch.ops.edm_deploy
LAYERS = (aten.conv2d.default, aten.linear.default)
PRODUCTS = (kernels.conv2d.default, kernels.linear.default)
assert ops.SCHEMAS  # importing the file registers the operators


@dataclass(kw_only=True)
class GraphRewrite:
    """A graph that is being rewritten, and every tensor it may read.

    Attributes:
        graph: The graph.
        tensors: By get_attr target: the model's parameters with the prefix `model.`, those of packed layers with `sites.`.
        dtype: Floating-point type between the sites.
        exact: float32, the model's one-dimensional parameters by get_attr target, as the artifact stores them.
        inputs: For each site the node of its input in the float program.
        codes: For each site the node of its input's codes.
        products: For each site the node of its output.
        added: Nodes between an input and its codes or sizes.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    exact: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, fx.Node] = field(default_factory=dict)
    added: set[fx.Node] = field(default_factory=set)
    codes: dict[str, fx.Node] = field(default_factory=dict)
    products: dict[str, fx.Node] = field(default_factory=dict)

    def tensor(self, name: str, value: Tensor | None = None) -> fx.Node:
        """A get_attr node at the graph's current insertion point."""
        if value is not None:
            self.tensors[name] = value
        return self.graph.get_attr(name)

    def call(self, target: Any, x: Any, *arguments: Any) -> fx.Node:
        """A node at the graph's current insertion point that reads a site's input, or a value computed from it."""
        node = self.graph.call_function(target, (x, *arguments))
        self.added.add(node)
        return node

    def cast(self, x: fx.Node) -> fx.Node:
        """A site's input in the type between the sites: itself, or a node behind it that all of its readers share."""
        if value_of(x).dtype == self.dtype:
            return x
        for user in x.users:
            if user.target is aten.to.dtype and user.args[1:] == (self.dtype,) and user in self.added:
                return user
        node = self.call(aten.to.dtype, x, self.dtype)
        node.meta["val"] = value_of(x).to(self.dtype)
        return node

    def module(self) -> fx.GraphModule:
        """The graph as a module with the tensors it reads."""
        self.graph.eliminate_dead_code()
        self.graph.lint()
        read = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return fx.GraphModule({name: nn.Parameter(self.tensors[name], requires_grad=False) for name in read}, self.graph)


def rewrite_layers(
    program: ExportedProgram, sites: Mapping[str, PackedLayer], params: Mapping[str, Tensor], row_of_timestep: Tensor, dtype: torch.dtype
) -> GraphRewrite:
    """Rewrite every site of the program to its integer form, without fusions.

    Args:
        program: From `exported_program`, in `dtype`.
        sites: Every quantized layer, on the device that the graph will run on.
        params: The artifact's other parameters, by the model's names; one-dimensional ones float32, others in `dtype`.
        row_of_timestep: int32 [num_train_timesteps].
        dtype: float16 or bfloat16.

    Raises:
        UnsupportedError: A site's weight does not feed exactly one convolution or matmul, or the model has a buffer that no artifact stores.
    """
    module = program.module(check_guards=False)
    graph = fx.Graph()  # a copy without an owning module: it may name tensors that are attached at the end
    graph.output(graph.graph_copy(module.graph, {}))
    result = GraphRewrite(graph=graph, tensors={}, dtype=dtype)
    clean(graph, row_of_timestep.device)
    merge_equal(graph)
    floats = {name for name, site in sites.items() if site.kind is None}
    _give_values(result, program, module, params, {name for name in sites if name not in floats})
    rows = _write_rows(result, row_of_timestep)
    shared: list[tuple[fx.Node, PackedLayer, fx.Node]] = []
    layers = {site_node(graph, name): name for name in sites}
    for layer in list(graph.nodes):  # in the order of the graph: the first of the sites that share codes computes them
        if (name := layers.get(layer)) is not None:
            with graph.inserting_before(layer):
                _rewrite(result, name, sites[name], layer, rows, shared)
    return result


def site_node(graph: fx.Graph, name: str) -> fx.Node:
    """The convolution or matmul that a site's weight feeds.

    Raises:
        UnsupportedError: It feeds none, several, or another operator.
    """
    users: list[fx.Node] = [
        user for node in graph.nodes if node.op == "get_attr" and node.target == f"{MODEL}{name}.weight" for user in node.users
    ]
    if len(users) != 1 or users[0].target not in LAYERS:
        found = ", ".join(str(user.target) for user in users) or "nothing"
        raise UnsupportedError(
            f"Site {name!r}: its weight feeds {found} in the traced model, expected one convolution or matmul. Let the family place it as 'float'."
        )
    return users[0]


def _give_values(
    result: GraphRewrite, program: ExportedProgram, module: fx.GraphModule, params: Mapping[str, Tensor], quantized: set[str]
) -> None:
    # Constants in the model's code, which the tracer lifts and names after their module. Buffers are not among them: the traced model has no data.
    lifted = set(program.graph_signature.inputs_to_lifted_tensor_constants.values())
    for node in result.graph.nodes:
        if node.op != "get_attr":
            continue
        name = str(node.target)
        if name in lifted or not name.startswith(MODEL):
            result.tensors[name] = operator.attrgetter(name)(module).to(next(iter(params.values())).device)
        elif (parameter := name.removeprefix(MODEL)) in params:
            result.tensors[name] = params[parameter].to(value_of(node).dtype)
            if params[parameter].ndim == 1:
                result.exact[name] = params[parameter].float()
        elif parameter.rpartition(".")[0] not in quantized:
            raise UnsupportedError(
                f"The model reads {parameter!r}, which no artifact holds: it is neither a parameter nor a persistent buffer."
            )


def _write_rows(result: GraphRewrite, row_of_timestep: Tensor) -> fx.Node:
    """`rows` int32 [B]: each sample's table row, from its timestep rounded to the nearest integer and clipped to the schedule."""
    last = [node for node in result.graph.nodes if node.op == "placeholder"][-1]
    with result.graph.inserting_before(last.next):
        table = result.tensor("row_of_timestep", row_of_timestep)
        return result.graph.call_function(rows_at, (timestep_of(result.graph), table))


def timestep_of(graph: fx.Graph) -> fx.Node:
    """The placeholder of the timestep, float32 [B]: the second input of every family."""
    placeholders: list[fx.Node] = [node for node in graph.nodes if node.op == "placeholder"]
    timestep = placeholders[1]
    assert value_of(timestep).dtype == torch.float32 and value_of(timestep).ndim == 1
    return timestep


def rows_at(timestep: Tensor, row_of_timestep: Tensor) -> Tensor:
    """Table rows, int32 [B], of `timestep` float32 [B]; computed in device memory, so that a CUDA graph can replay it."""
    index = timestep.round().clamp(0, len(row_of_timestep) - 1).long()
    return row_of_timestep[index]


def _rewrite(
    result: GraphRewrite, name: str, site: PackedLayer, layer: fx.Node, rows: fx.Node, shared: list[tuple[fx.Node, PackedLayer, fx.Node]]
) -> None:
    """Replace the layer of one site by its integer form."""
    x = layer.args[0]
    assert isinstance(x, fx.Node)
    result.inputs[name] = x
    if site.kind is None and site.inv_scale is None:  # weight-only: the float layer stays, on its dequantized weight
        result.products[name] = layer
        return
    codes = next((existing for node, other, existing in shared if node is x and other.quantizes_like(site)), None)
    if codes is None:
        codes = _codes(result, name, site, _as_map(result, layer, result.cast(x)), rows)
        shared.append((x, site, codes))
    result.codes[name] = codes
    if site.kind is None:
        layer.args = (_dequantized(result, name, site, codes, rows), *layer.args[1:])
        result.products[name] = layer
        return
    product = _product(result, name, site, layer, codes, rows)
    product.meta = dict(layer.meta)
    layer.replace_all_uses_with(product)
    result.graph.erase_node(layer)
    result.products[name] = product


def _as_map(result: GraphRewrite, layer: fx.Node, x: fx.Node) -> fx.Node:
    """Flatten a Linear's input of four axes to three: the kernels read four axes as a map."""
    if layer.target is aten.linear.default and value_of(layer.args[0]).ndim == 4:
        return result.call(aten.flatten.using_ints, x, 1, 2)
    return x


def _codes(result: GraphRewrite, name: str, site: PackedLayer, x: fx.Node, rows: fx.Node) -> fx.Node:
    assert site.inv_scale is not None and site.qmin is not None and site.qmax is not None
    columns = [result.tensor(tensor_name(name, what), getattr(site, what)) for what in ("inv_scale", "qmin", "qmax")]
    if site.kind is None:
        return result.call(float_codes, x, rows, *columns)
    return result.call(kernels.quantize.default, x, rows, *columns, bits_of(site.kind), site.kind == "u4", "none", 0)


def _dequantized(result: GraphRewrite, name: str, site: PackedLayer, codes: fx.Node, rows: fx.Node) -> fx.Node:
    scale = result.tensor(tensor_name(name, "act_scale"), site.act_scale)
    return result.graph.call_function(float_values, (codes, rows, scale, result.dtype))


def _product(result: GraphRewrite, name: str, site: PackedLayer, layer: Any, codes: fx.Node, rows: fx.Node) -> fx.Node:
    def tensor(what: str) -> fx.Node:
        return result.tensor(tensor_name(name, what), getattr(site, what))

    columns = [tensor(what) for what in ("weight", "zero", "act_scale", "qmin", "weight_scale", "weight_sum")]
    bias = None if site.bias is None else tensor("bias")
    operands = (codes, rows, *columns, bias, None, None, None, None, None, False, site.kind)
    if layer.target is aten.linear.default:
        x = layer.args[0]
        leading = [result.call(aten.sym_size.int, x, axis) for axis in range(value_of(x).ndim - 1)]
        return result.graph.call_function(kernels.linear.default, (*operands, leading, result.dtype))
    stride, padding = (list(layer.args[place]) if len(layer.args) > place else [default] for place, default in ((3, 1), (4, 0)))
    kernel = list(value_of(layer.args[1]).shape[2:])
    return result.graph.call_function(kernels.conv2d.default, (*operands, kernel, stride[0], padding[0], result.dtype))


def float_codes(x: Tensor, rows: Tensor, inv_scale: Tensor, qmin: Tensor, qmax: Tensor) -> Tensor:
    """Codes of a site that no kernel computes: integers in float32, in the shape of `x`."""
    inv_scale, low, high = (per_sample(column, rows.long(), x) for column in (inv_scale, qmin, qmax))
    return torch.minimum(torch.maximum((x.float() * inv_scale).round(), low), high)


def float_values(codes: Tensor, rows: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantized values of codes, in `dtype`."""
    return (codes * per_sample(scale, rows.long(), codes)).to(dtype)


def cut_at_layers(result: GraphRewrite, kept: Collection[fx.Node] = ()) -> dict[str, str]:
    """Reduce an unfused graph to its sites, each with a separate input, and remove the network between them.

    Args:
        result: The graph, changed in place.
        kept: Placeholders that stay after those of the sites.

    Returns:
        For each site the name of the placeholder that is its input; sites with the same input share one. The placeholders follow `timestep` in
        the order of their first sites. The graph returns two dicts by site: codes as the kernels store them, and outputs.
    """
    graph, names = result.graph, dict[fx.Node, str]()
    timestep = last = timestep_of(graph)
    for x in result.inputs.values():
        if x in names:
            continue
        names[x] = f"x_{len(names)}"
        with graph.inserting_after(last):
            last = graph.placeholder(names[x])
        layers = {product for site, product in result.products.items() if result.inputs[site] is x}
        for user in list(x.users):
            if user in result.added or user in layers:
                user.replace_input_with(x, last)
    output = graph.output_node()
    output.args = ((dict(result.codes), dict(result.products)),)
    for node in reversed(list(graph.nodes)):
        needed = node.op == "output" or node is timestep or node in kept or (node.op == "placeholder" and node.name in names.values())
        if not needed and not node.users:  # including the tracer's checks on sizes, which eliminate_dead_code keeps
            graph.erase_node(node)
    return {name: names[x] for name, x in result.inputs.items()}
