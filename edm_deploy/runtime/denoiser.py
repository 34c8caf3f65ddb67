"""EngineDenoiser: an engine in place of a diffusers denoiser, in any pipeline and with any scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from edm_deploy.artifact.timestep_correction import Correction, DenoiseFn
from edm_deploy.artifact.timestep_routing import route_by_timestep
from edm_deploy.errors import InputError, flag
from edm_deploy.models import family_named
from edm_deploy.network.family import SAMPLE, TIMESTEP, Family, ModelInput
from edm_deploy.runtime.backend import Session
from edm_deploy.runtime.manifest import Manifest, ShapeRange


class EngineDenoiser(nn.Module):
    """An engine with `.config`, `.dtype`, `.device`, forward signature and output type of the diffusers model that it replaces. Has no parameters.

    May be called from several threads, as its sessions may. A context manager: it closes its engines on exit, after which a call raises InputError.

    Args:
        manifest: The engine's manifest.
        session: The opened engine.
        relaxed: The opened second engine, where the manifest routes timesteps to one.
    """

    def __init__(self, manifest: Manifest, session: Session, relaxed: Session | None = None) -> None:
        super().__init__()
        self.manifest = manifest
        self.session = session
        self._sessions = [opened for opened in (session, relaxed) if opened is not None]
        self._run = route_by_timestep([self._runs(opened) for opened in self._sessions], manifest.engine_of_timestep)
        if manifest.correction:
            self._run = Correction.from_json(manifest.correction).around(self._run)
        self.family: Family = family_named(manifest.family)
        self.config = self.family.freeze_config(manifest.config)
        for name, value in self.family.attributes(manifest.config).items():
            setattr(self, name, value)

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the engine's sample input; other floating-point types are converted."""
        return self.manifest.torch_dtype

    @property
    def device(self) -> torch.device:
        """Device that inputs must be on."""
        return self.session.device

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # the signature is that of the model it replaces
        """Same as the diffusers model: `denoiser(sample, timestep, ...).sample`, or a tuple with return_dict=False.

        Samples of one batch may have different timesteps.

        Raises:
            InputError: An input's dtype, device or shape is not what the engine was built for, a timestep is outside the schedule, or the engine is closed.
        """
        inputs = self.family.bind(self.manifest.config, args, kwargs)
        sample = inputs[SAMPLE]
        if not isinstance(sample, Tensor) or not sample.is_floating_point():
            found = sample.dtype if isinstance(sample, Tensor) else type(sample).__name__
            raise InputError(f"sample is {found}, expected a floating-point tensor. Convert it with .to(torch.float32).")
        prediction = self.run(inputs).to(sample.dtype)
        return self.family.output(prediction) if kwargs.get("return_dict", True) else (prediction,)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """The graph's output for graph inputs by name; one timestep may be given for all samples.

        Raises:
            InputError: As `forward`.
        """
        return self._run(self._inputs(inputs, inputs[SAMPLE]))

    def close(self) -> None:
        """Release the memory of every engine, once the running calls have returned. Closing again has no effect."""
        for session in self._sessions:
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to(self, *args: Any, **kwargs: Any) -> EngineDenoiser:
        """Return self: an engine is bound to its device when it is opened. Another device raises InputError."""
        device, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != self.device.type:
            raise InputError(
                f"This engine runs on {self.device}; it cannot move to {device}. Open it with load_denoiser(..., device={str(device)!r})."
            )
        return self

    def _runs(self, session: Session) -> DenoiseFn:
        """A session as a function. Where routing leaves fewer samples than the profile's minimum, the last sample is repeated."""
        minimum = self.manifest.profile.get("batch", ShapeRange(1, 1, 1)).min

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            count = len(inputs[SAMPLE])
            if count < minimum:
                padded = torch.arange(minimum).clamp(max=count - 1)
                inputs = {name: value[padded.to(value.device)] for name, value in inputs.items()}
            contiguous = {name: value.contiguous() for name, value in inputs.items()}
            return session.run(contiguous)[self.manifest.outputs[0]][:count]

        return run

    def _inputs(self, values: Mapping[str, Any], sample: Tensor) -> dict[str, Tensor]:
        sizes: dict[str, int] = {}
        inputs = {}
        for declared in self.manifest.inputs:
            value = values[declared.name]
            if declared.name == TIMESTEP.name:
                value = self._timesteps(value, len(sample))
            if not isinstance(value, Tensor):
                raise InputError(f"{declared.name} is {type(value).__name__}, expected a tensor.")
            if value.device.type != self.device.type:
                raise InputError(
                    f"{declared.name} is on {value.device}, the engine on {self.device}. Move it with .to({str(self.device)!r})."
                )
            self._check_shape(declared, value, sizes)
            inputs[declared.name] = value.to(declared.dtype(self.dtype)).contiguous()
        return inputs

    def _timesteps(self, value: Any, batch: int) -> Tensor:
        timesteps = torch.as_tensor(value, dtype=torch.float32).to(self.device).reshape(-1)
        last = self.manifest.num_train_timesteps - (0 if self.family.flow else 1)
        outside = (timesteps.round() < 0) | (timesteps.round() > last) | ~timesteps.isfinite()
        if bool(outside.any()):
            raise InputError(f"timestep {float(timesteps[outside][0]):g} is outside the schedule; expected 0 to {last}.")
        if len(timesteps) not in (1, batch):
            raise InputError(f"{len(timesteps)} timesteps for a batch of {batch}; expected one, or one for each sample.")
        return timesteps.expand(batch)

    def _check_shape(self, declared: ModelInput, value: Tensor, sizes: dict[str, int]) -> None:
        if value.ndim != len(declared.dims):
            raise InputError(
                f"{declared.name} has shape {list(value.shape)}, expected {len(declared.dims)} dimensions {list(declared.dims)}."
            )
        multiple = self.family.size_multiple(self.manifest.config)
        for dim, size in zip(declared.dims, value.shape, strict=True):
            if isinstance(dim, int):
                if size != dim:
                    raise InputError(f"{declared.name} has shape {list(value.shape)}, expected {list(declared.dims)}.")
                continue
            if sizes.setdefault(dim, size) != size:
                raise InputError(f"{declared.name} has {dim} {size}, another input has {sizes[dim]}. Make them equal.")
            allowed = self.manifest.profile.get(dim, ShapeRange(1, 1, 1 << 30))
            if not allowed.min <= size <= allowed.max:
                raise InputError(
                    f"{dim} {size} is outside the engine's profile {allowed.min}:{allowed.opt}:{allowed.max}. "
                    f"Use smaller pieces, or build again with {flag(dim)} {min(size, allowed.min)}:{allowed.opt}:{max(size, allowed.max)}."
                )
            if dim in ("height", "width") and size % multiple:
                raise InputError(f"{dim} {size} is not a multiple of {multiple}, which this model's levels need.")
