"""The float graph of a denoiser before simplification, and the nodes of each site in it, found by parameter name."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
import torch

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy.network.family import Config, Family, ModelInput
from edm_deploy.network.float_program import MODEL, exported_program, without_library_output
from edm_deploy.network.graph_names import OUTPUT
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite

OPSET = 21  # the first with INT4 initialisers and per-group normalization as one op


@dataclass(frozen=True)
class SiteNodes:
    """The nodes of one site in the float graph.

    Attributes:
        node: The Conv, MatMul or Gemm.
        y: The output of the layer, including its bias.
        dead: Nodes that are replaced: the node, the Transpose of its weight, the Add of its bias.
    """

    node: ir.Node
    y: ir.Value
    dead: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        """The current input of the layer, which changes when the site before it is rewritten."""
        (x, *_) = self.node.inputs
        assert x is not None
        return x


def trace(family: Family, config: Config, dtype: torch.dtype, structure: NetworkRewrite = PUBLISHED) -> ir.Model:
    """Trace the float graph at opset 21. Initialisers are named as in the model's state dict and hold no data.

    Args:
        family: The model family.
        config: Config of the model.
        dtype: float32 or float16, the graph's floating-point type.
        structure: Rewrites of the network.

    Raises:
        UnsupportedError: torch cannot trace this config.
    """
    inputs = family.inputs(config)
    exported = exported_program(family, config, dtype, structure=structure)
    with without_library_output():
        try:
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[declared.name for declared in inputs],
                output_names=[OUTPUT],
            )
        except Exception as err:  # torch wraps every failure of its exporter in classes that share no base
            raise UnsupportedError(f"torch.onnx cannot export {family.class_name} with this config: {first_line(err)}.") from err
    assert program is not None
    graph_model: ir.Model = program.model
    for name in list(graph_model.graph.initializers):
        if name.startswith(MODEL):
            value = graph_model.graph.initializers.pop(name)
            value.name = name.removeprefix(MODEL)
            graph_model.graph.initializers[value.name] = value
    _name_dimensions(graph_model, inputs)
    return graph_model


def find_sites(graph: ir.Graph, names: list[str]) -> dict[str, SiteNodes]:
    """The nodes of each site.

    Raises:
        UnsupportedError: A site's weight is not the input of exactly one Conv, Gemm or MatMul.
    """
    return {name: _site_nodes(graph, name) for name in names}


def _site_nodes(graph: ir.Graph, name: str) -> SiteNodes:
    weight = graph.initializers.get(f"{name}.weight")
    # For a convolution without bias the exporter adds one of zeros, sized by the Shape of the weight; both are replaced with the convolution.
    users = [use.node for use in weight.uses() if use.node.op_type != "Shape"] if weight is not None else []
    dead: list[ir.Node] = []
    while len(users) == 1 and users[0].op_type in ("Transpose", "Identity"):
        dead.append(users[0])
        users = [use.node for use in users[0].outputs[0].uses()]
    if len(users) != 1 or users[0].op_type not in ("Conv", "Gemm", "MatMul"):
        raise UnsupportedError(
            f"Site {name!r}: its weight feeds {[node.op_type for node in users] or 'nothing'} in the traced graph, expected one Conv, Gemm or MatMul. "
            "Let the family place it as 'float'."
        )
    node = users[0]
    y = node.outputs[0]
    dead.append(node)
    bias = graph.initializers.get(f"{name}.bias")
    if node.op_type == "MatMul" and bias is not None:
        (add,) = (use.node for use in y.uses())
        if add.op_type != "Add" or bias not in add.inputs:
            raise UnsupportedError(
                f"Site {name!r}: its bias is not added right after the MatMul (found {add.op_type}). Let the family place it as 'float'."
            )
        dead.append(add)
        y = add.outputs[0]
    return SiteNodes(node, y, tuple(dead))


def _name_dimensions(model: ir.Model, inputs: tuple[ModelInput, ...]) -> None:
    """Name the dynamic dimensions of the graph's inputs and output as the engines' profile options do: `height`, not `4*height`."""
    for value, declared in zip(model.graph.inputs, inputs, strict=True):
        value.shape = ir.Shape(declared.dims)
    (output,) = model.graph.outputs
    assert output.shape is not None
    # The output has the dimensions of the sample, except for its number of channels.
    output.shape = ir.Shape([dim if isinstance(dim, str) else size for dim, size in zip(inputs[0].dims, output.shape, strict=True)])
