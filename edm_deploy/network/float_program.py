"""The float program of a denoiser as torch.export sees it: aten operators on dynamic shapes, drawn from empty weights. Needs no onnx."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from edm_deploy.errors import UnsupportedError, first_line
from edm_deploy.network.family import Config, Family, ModelInput, meta_model
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite

# In multiples; distinct, so that no two dimensions are taken for one.
_TRACE_SIZES = {"batch": 2, "height": 4, "width": 6, "tokens": 7, "image_tokens": 9}
MODEL = "model."  # stands before each parameter's name in the program


class _Denoiser(nn.Module):
    """A model behind the family's input names, so that the exporter sees plain tensors; casts where the model's type is not the inputs'."""

    def __init__(
        self, family: Family, model: nn.Module, inputs: tuple[ModelInput, ...], dtype: torch.dtype, input_dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.family, self.model, self.inputs = family, model, inputs
        self.dtype, self.input_dtype = dtype, input_dtype

    def forward(self, *inputs: Tensor) -> Tensor:
        given = {declared.name: value for declared, value in zip(self.inputs, inputs, strict=True)}
        if self.dtype == self.input_dtype:
            return self.family.forward(self.model, given)
        floats = {declared.name for declared in self.inputs if declared.kind == "float"}
        cast = {name: value.to(self.dtype) if name in floats else value for name, value in given.items()}
        return self.family.forward(self.model, cast).to(self.input_dtype)


def exported_program(
    family: Family, config: Config, dtype: torch.dtype, *, input_dtype: torch.dtype | None = None, structure: NetworkRewrite = PUBLISHED
) -> ExportedProgram:
    """The float model, traced; parameters are named as in its state dict, behind `model.`, and hold no data.

    Args:
        family: The model family.
        config: Its config.
        dtype: Floating-point type that the model computes in. Timesteps stay float32.
        input_dtype: Floating-point type of the program's inputs and output; None is `dtype`.
        structure: What the network computes otherwise.

    Raises:
        UnsupportedError: torch cannot trace this config.
    """
    inputs = family.inputs(config)
    multiple = family.size_multiple(config)
    input_dtype = input_dtype or dtype
    # Empty tensors cost address space only: the tracer looks at shapes, never at values, so no float weight is ever in memory.
    with quiet():
        model = meta_model(family, config, structure).to(dtype).to_empty(device="cpu")
        wrapped = _Denoiser(family, model, inputs, dtype, input_dtype).eval()
        arguments = tuple(_example(declared, multiple, input_dtype) for declared in inputs)
        dynamic = (tuple(_dynamic_dims(declared, multiple, family.limits(config)) for declared in inputs),)
        try:
            return torch.export.export(wrapped, arguments, dynamic_shapes=dynamic, strict=False)
        except Exception as err:  # torch wraps every failure of its tracer in classes that share no base
            raise UnsupportedError(f"torch.export cannot trace {family.class_name} with this config: {first_line(err)}.") from err


def _example(declared: ModelInput, multiple: int, dtype: torch.dtype) -> Tensor:
    shape = [_TRACE_SIZES.get(dim, 5) * _factor(dim, multiple) if isinstance(dim, str) else dim for dim in declared.dims]
    return torch.zeros(shape, dtype=declared.dtype(dtype))


def _factor(dim: str, multiple: int) -> int:
    return multiple if dim in ("height", "width") else 1


def _dynamic_dims(declared: ModelInput, multiple: int, limits: Mapping[str, int]) -> dict[int, object]:
    dims: dict[int, object] = {}
    for axis, dim in enumerate(declared.dims):
        if isinstance(dim, str):
            # diffusers' upsampling makes its input contiguous from 64 samples on, which changes no value: below it, one trace serves all.
            factor = _factor(dim, multiple)
            largest = 63 if dim == "batch" else limits[dim] // factor if dim in limits else None
            base = torch.export.Dim(dim, max=largest)
            dims[axis] = factor * base if factor > 1 else base
    return dims


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print and warn about packages that they do not need; none of it is the user's to mend."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
