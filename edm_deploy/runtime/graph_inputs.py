"""The inputs of one call of an engine: checked against its manifest, converted to its types; and predictions of inputs that are not finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import InputError, flag
from edm_deploy.network.family import SAMPLE, TIMESTEP, Family, ModelInput, is_dense, kind_of, timestep_tensor
from edm_deploy.runtime.manifest import MAX_SIZE, Manifest, ShapeRange


@dataclass(frozen=True)
class InputChecks:
    """The checks of graph inputs by name. They cost microseconds: each reads shapes and types, and values of timesteps and labels only.

    Attributes:
        manifest: The engine's manifest.
        family: Family of its model.
        device: Device that inputs must be on.
        last_timestep: The largest timestep that the model has.
    """

    manifest: Manifest
    family: Family
    device: torch.device
    last_timestep: int

    def converted(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """The inputs in the engine's types, contiguous; one timestep is repeated for all samples.

        Raises:
            InputError: An input is missing, or its dtype, device, shape or value is not what the engine was built for.
        """
        sizes: dict[str, int] = {}
        inputs = {}
        for declared in self.manifest.inputs:
            if declared.name not in values:
                names = ", ".join(each.name for each in self.manifest.inputs)
                raise InputError(f"There is no input {declared.name!r}; expected {names}. Pass it as to the diffusers model.")
            value = values[declared.name]
            if declared.name == TIMESTEP.name:
                value = self._timesteps(value, sizes["batch"])
            self._check_type(declared, value)
            self._check_shape(declared, value, sizes)
            inputs[declared.name] = value.to(declared.dtype(self.manifest.torch_dtype)).contiguous()
            self._check_labels(declared, inputs[declared.name])
        return inputs

    def _timesteps(self, value: Any, batch: int) -> Tensor:
        timesteps = timestep_tensor(value).reshape(-1)
        # Before they are moved: reading values that a GPU holds waits for the step before.
        outside = (timesteps.round() < 0) | (timesteps.round() > self.last_timestep) | ~timesteps.isfinite()
        if bool(outside.any()):
            raise InputError(f"timestep {float(timesteps[outside][0]):g} is outside the schedule; expected 0 to {self.last_timestep}.")
        if len(timesteps) not in (1, batch):
            raise InputError(f"{len(timesteps)} timesteps for a batch of {batch}; expected one, or one for each sample.")
        return timesteps.to(self.device, non_blocking=True).expand(batch)

    def _check_type(self, declared: ModelInput, value: Any) -> None:
        name = declared.name
        if not isinstance(value, Tensor):
            kind = "a floating-point tensor" if name == SAMPLE else "a tensor"
            raise InputError(f"{name} is {type(value).__name__}, expected {kind}. Convert it with torch.as_tensor.")
        if not is_dense(value):
            raise InputError(
                f"{name} is {kind_of(value)}, expected a dense one. Convert it with .to_dense(), .to_padded_tensor() or .dequantize()."
            )
        if name == SAMPLE and not value.is_floating_point():
            raise InputError(f"{name} is {value.dtype}, expected a floating-point tensor. Convert it with .to(torch.float32).")
        integers = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if declared.kind == "int64" and not integers:
            raise InputError(f"{name} is {value.dtype}, expected integers. Convert it with .to(torch.int64).")
        if value.is_complex():
            raise InputError(f"{name} is {value.dtype}, expected real numbers. Pass its .real.")
        if value.device.type != self.device.type:
            raise InputError(f"{name} is on {value.device}, the engine on {self.device}. Move it with .to({str(self.device)!r}).")

    def _check_shape(self, declared: ModelInput, value: Tensor, sizes: dict[str, int]) -> None:
        """Raises InputError where a shape does not fit the manifest or `sizes`, those of earlier inputs, to which it adds its own."""
        name, shape = declared.name, list(value.shape)
        if len(shape) != len(declared.dims):
            raise InputError(f"{name} has shape {shape}, expected {len(declared.dims)} dimensions {list(declared.dims)}. Reshape it.")
        for dim, size in zip(declared.dims, shape, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(
                        f"{name} has shape {shape}, expected {list(declared.dims)}. Pass the input of the model that was quantized."
                    )
                continue
            if sizes.setdefault(dim, size) != size:
                raise InputError(f"{name} has {dim} {size}, another input has {sizes[dim]}. Make them equal.")
            self._check_size(dim, size)

    def _check_size(self, dim: str, size: int) -> None:
        if size < 1:
            raise InputError(f"{dim} is {size}, expected 1 or more. Pass tensors that are not empty.")
        multiple = self.family.size_multiple(self.manifest.config) if dim in ("height", "width") else 1
        if size % multiple:
            raise InputError(f"{dim} {size} is not a multiple of {multiple}, which this model's levels need. Crop or pad the sample.")
        allowed = self.manifest.profile.get(dim, ShapeRange(1, 1, 1 << 30))
        largest = self.family.limits(self.manifest.config).get(dim, MAX_SIZE)
        if size > max(largest, allowed.max):
            raise InputError(f"{dim} is {size}, expected at most {largest}: no engine of this model takes more. Use smaller pieces.")
        if not allowed.min <= size <= allowed.max:
            raise InputError(
                f"{dim} {size} is outside the engine's profile {allowed.min}:{allowed.opt}:{allowed.max}. "
                f"Use smaller pieces, or build again with {flag(dim)} {min(size, allowed.min)}:{allowed.opt}:{max(size, allowed.max)}."
            )

    def _check_labels(self, declared: ModelInput, value: Tensor) -> None:
        """Raises InputError where an index is outside its table, which some backends read beyond and others answer by a nearby row."""
        count = self.family.labels(self.manifest.config) if declared.kind == "int64" else None
        if count is None:
            return
        low, high = torch.stack(value.aminmax()).tolist()  # one copy from a GPU
        if low < 0 or high >= count:
            found, classes = low if low < 0 else high, self.family.classes(self.manifest.config)
            none = f", of which {classes} is no class" if classes != count else ""
            raise InputError(
                f"{declared.name} holds {found}, expected 0 to {count - 1}{none}. Pass indices of the model's classes, from 0."
            )


def filled_batch(inputs: Mapping[str, Tensor], size: int) -> Mapping[str, Tensor]:
    """`inputs`, [B, ...] each, with the last sample repeated up to a batch of `size`; unchanged where B is `size` or more."""
    batch = len(inputs[TIMESTEP.name])
    if batch >= size:
        return inputs
    rows = torch.arange(size).clamp(max=batch - 1)
    return {name: value[rows.to(value.device)] for name, value in inputs.items()}


def nan_where_not_finite(prediction: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """`prediction` with NaN for each sample of which an input holds NaN or infinity, as a floating-point model predicts it.

    Integer arithmetic has no NaN: a quantizer makes some code of it, and the prediction would look like any other.

    Args:
        prediction: Output of the graph, [B, ...].
        inputs: Inputs of the graph by name, in its types, [B, ...] each. The timestep is known to be finite.
    """
    real = [value for name, value in inputs.items() if name != TIMESTEP.name and value.is_floating_point()]
    finite = torch.stack([value.isfinite().reshape(len(value), -1).all(1) for value in real]).all(0)
    # No test of `finite` first: on a GPU it would wait for the prediction.
    return prediction.masked_fill(~finite.reshape(-1, *[1] * (prediction.ndim - 1)), torch.nan)
