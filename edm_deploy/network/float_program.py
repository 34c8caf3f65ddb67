"""The float program of a denoiser: aten operators on dynamic shapes, traced by torch.export without weights. Does not need onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy.network.family import Config, Family, ModelInput
from edm_deploy.network.meta_model import meta_model
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite

# In units of size_multiple; distinct, so that torch.export does not identify two dimensions.
_TRACE_SIZES = {"batch": 2, "height": 4, "width": 6, "tokens": 7, "image_tokens": 9}
ROTATION = (
    torch.ops.aten.unflatten.int,
    torch.ops.aten.matmul.default,
    torch.ops.aten.flatten.using_ints,
)  # of `rotate`, all without side effects
MODEL = "model."  # prefix of each parameter's name in the program


class _Denoiser(nn.Module):
    """A model as a function of plain tensors in the order of the family's inputs; casts where its dtype differs from that of the inputs."""

    def __init__(
        self, family: Family, model: nn.Module, inputs: tuple[ModelInput, ...], dtype: torch.dtype, input_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.family, self.model, self.inputs = family, model, inputs
        self.dtype, self.input_dtype = dtype, input_dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        named = {declared.name: value for declared, value in zip(self.inputs, inputs, strict=True)}
        if self.dtype == self.input_dtype:
            return self.family.forward(self.model, named)
        floats = {declared.name for declared in self.inputs if declared.kind == "float"}
        cast = {name: value.to(self.dtype) if name in floats else value for name, value in named.items()}
        return self.family.forward(self.model, cast).to(self.input_dtype)


def exported_program(
    family: Family, config: Config, dtype: torch.dtype, *, input_dtype: torch.dtype | None = None, structure: NetworkRewrite = PUBLISHED
) -> ExportedProgram:
    """Trace the float model. Parameters are named as in its state dict with the prefix `model.`, and hold no data.

    Args:
        family: The model family.
        config: Config of the model.
        dtype: Floating-point type of the computation. Timesteps are float32 in any case.
        input_dtype: Floating-point type of the program's inputs and output; None is `dtype`.
        structure: Rewrites of the network.

    Raises:
        UnsupportedError: torch cannot trace this config.
    """
    inputs = family.inputs(config)
    multiple = family.size_multiple(config)
    input_dtype = input_dtype or dtype
    # Empty tensors take address space only: the tracer reads shapes, not values, so that no float weight is ever in memory.
    with without_library_output():
        model = meta_model(family, config, structure).to(dtype).to_empty(device="cpu")
        wrapped = _Denoiser(family, model, inputs, dtype, input_dtype).eval()
        arguments = tuple(_example(declared, multiple, input_dtype) for declared in inputs)
        dynamic = (tuple(_dynamic_dims(declared, multiple, family.limits(config)) for declared in inputs),)
        try:
            program = torch.export.export(wrapped, arguments, dynamic_shapes=dynamic, strict=False)
        except Exception as err:  # torch wraps every failure of its tracer in classes that share no base
            # These two state Python types, which are not in the config.
            reason = (
                "a field has a value that its forward cannot compute with"
                if isinstance(err, TypeError | AttributeError)
                else first_line(err)
            )
            raise UnsupportedError(f"torch.export cannot trace {family.class_name} with this config: {reason}.") from err
    if structure.rotated:
        _merge_rotations(program)
    return program


def _merge_rotations(program: ExportedProgram) -> None:
    """Rotate a value once for all layers that read it, such as q, k and v, so that they read one value and share its codes."""
    first: dict[Any, Node] = {}
    for node in list(program.graph.nodes):
        if node.target in ROTATION and not node.kwargs:
            kept = first.setdefault((node.target, node.args), node)
            if kept is not node:
                node.replace_all_uses_with(kept)
                program.graph.erase_node(node)
    program.graph_module.recompile()


def _example(declared: ModelInput, multiple: int, dtype: torch.dtype) -> Tensor:
    shape = [_TRACE_SIZES.get(dim, 5) * _factor(dim, multiple) if isinstance(dim, str) else dim for dim in declared.dims]
    return torch.zeros(shape, dtype=declared.dtype(dtype))


def _factor(dim: str, multiple: int) -> int:
    return multiple if dim in ("height", "width") else 1


def _dynamic_dims(declared: ModelInput, multiple: int, limits: Mapping[str, int]) -> dict[int, object]:
    dims: dict[int, object] = {}
    for axis, dim in enumerate(declared.dims):
        if isinstance(dim, str):
            # From 64 samples on, diffusers' upsampling makes its input contiguous, which changes no value; below, one trace covers all sizes.
            factor = _factor(dim, multiple)
            largest = 63 if dim == "batch" else limits[dim] // factor if dim in limits else None
            base = torch.export.Dim(dim, max=largest)
            dims[axis] = factor * base if factor > 1 else base
    return dims


@contextlib.contextmanager
def without_library_output() -> Iterator[None]:
    """Silence torch's exporters, which print and warn about packages that they do not need. A user can remedy none of it."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
