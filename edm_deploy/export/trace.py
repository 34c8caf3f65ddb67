"""The float graph of a denoiser, unoptimised, with each site found by its parameter's name."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy.family import Config, Family, ModelInput, skeleton

OPSET = 21  # the first with INT4 initialisers and per-group normalization as one op
OUTPUT = "prediction"
_TRACE_SIZES = {"batch": 2, "height": 4, "width": 6, "tokens": 7}  # in multiples; distinct, so that no two dimensions are taken for one


@dataclass(frozen=True)
class SiteNodes:
    """Where one site stands in the float graph.

    Attributes:
        node: Its Conv, MatMul or Gemm.
        y: Its output, bias included.
        dead: Nodes that vanish with the float weight: the node itself, its weight's Transpose, its bias' Add.
    """

    node: ir.Node
    y: ir.Value
    dead: tuple[ir.Node, ...]

    @property
    def x(self) -> ir.Value:
        """Its input, as the graph stands now: rewriting the site before it puts another value there."""
        (x, *_) = self.node.inputs
        assert x is not None
        return x


class _Denoiser(nn.Module):
    """A model behind the family's input names, so that the exporter sees plain tensors."""

    def __init__(self, family: Family, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.family, self.model, self.names = family, model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.family.forward(self.model, dict(zip(self.names, inputs, strict=True)))


def trace(family: Family, config: Config, dtype: torch.dtype) -> ir.Model:
    """The float graph at opset 21; initialisers are named as in the model's state dict and hold no data yet.

    Args:
        family: The model family.
        config: Its config.
        dtype: float32 or float16, the graph's floating-point type.

    Raises:
        UnsupportedError: torch cannot trace this config.
    """
    inputs = family.inputs(config)
    multiple = family.size_multiple(config)
    # Empty tensors cost address space only: the tracer looks at shapes, never at values, so no float weight is ever in memory.
    with _quiet():
        model = skeleton(family, config).to(dtype).to_empty(device="cpu")
        arguments = tuple(_example(declared, multiple, dtype) for declared in inputs)
        wrapped = _Denoiser(family, model, tuple(declared.name for declared in inputs)).eval()
        try:
            exported = torch.export.export(
                wrapped, arguments, dynamic_shapes=(tuple(_dynamic_dims(declared, multiple) for declared in inputs),), strict=False
            )
            program = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
                input_names=[declared.name for declared in inputs],
                output_names=[OUTPUT],
            )
        except Exception as err:  # torch wraps every failure of its tracer in classes that share no base
            raise UnsupportedError(f"torch.onnx cannot trace {family.class_name} with this config: {first_line(err)}.") from err
    assert program is not None
    graph_model: ir.Model = program.model
    for name in list(graph_model.graph.initializers):
        if name.startswith("model."):
            value = graph_model.graph.initializers.pop(name)
            value.name = name.removeprefix("model.")
            graph_model.graph.initializers[value.name] = value
    _name_dimensions(graph_model, inputs, multiple)
    return graph_model


def find_sites(graph: ir.Graph, names: list[str]) -> dict[str, SiteNodes]:
    """The nodes of each site.

    Raises:
        UnsupportedError: A site's weight does not feed exactly one Conv, Gemm or MatMul.
    """
    return {name: _site_nodes(graph, name) for name in names}


def _site_nodes(graph: ir.Graph, name: str) -> SiteNodes:
    weight = graph.initializers.get(f"{name}.weight")
    users = [use.node for use in weight.uses()] if weight is not None else []
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


def _example(declared: ModelInput, multiple: int, dtype: torch.dtype) -> Tensor:
    shape = [_TRACE_SIZES.get(dim, 5) * _factor(dim, multiple) if isinstance(dim, str) else dim for dim in declared.dims]
    return torch.zeros(shape, dtype=declared.dtype(dtype))


def _factor(dim: str, multiple: int) -> int:
    return multiple if dim in ("height", "width") else 1


def _dynamic_dims(declared: ModelInput, multiple: int) -> dict[int, object]:
    dims: dict[int, object] = {}
    for axis, dim in enumerate(declared.dims):
        if isinstance(dim, str):
            # diffusers' upsampling makes its input contiguous from 64 samples on, which changes no value: below it, one trace serves all.
            base = torch.export.Dim(dim, max=63) if dim == "batch" else torch.export.Dim(dim)
            dims[axis] = multiple * base if _factor(dim, multiple) > 1 else base
    return dims


def _name_dimensions(model: ir.Model, inputs: tuple[ModelInput, ...], multiple: int) -> None:
    """Plain names (`height`, not `4*height`) on the graph's inputs and output, as every engine's profile options use them."""
    for value, declared in zip(model.graph.inputs, inputs, strict=True):
        value.shape = ir.Shape(declared.dims)
    (output,) = model.graph.outputs
    assert output.shape is not None
    output.shape = ir.Shape([inputs[0].dims[0], output.shape[1], *inputs[0].dims[2:]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints and warns about packages that it does not need; none of it is the user's to mend."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
