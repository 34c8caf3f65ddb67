"""EngineDenoiser: an engine in place of a diffusers denoiser, in any pipeline and with any scheduler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from edm_deploy.adapters.slots import SlotState
from edm_deploy.artifact.timestep_correction import Correction, DenoiseFn
from edm_deploy.artifact.timestep_routing import route_by_timestep
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.adapter_inputs import SLOT_SCALES
from edm_deploy.network.family import SAMPLE, Family
from edm_deploy.runtime.backend import Session
from edm_deploy.runtime.graph_inputs import InputChecks, filled_batch, nan_where_not_finite
from edm_deploy.runtime.lora_methods import LoraMethods
from edm_deploy.runtime.manifest import Manifest, ShapeRange


class EngineDenoiser(LoraMethods, nn.Module):
    """An engine with `.config`, `.dtype`, `.device`, forward signature and output type of the diffusers model that it replaces. Has no parameters.

    May be called from several threads, as its sessions may. A context manager: it closes its engines on exit, after which a call raises InputError.

    Args:
        manifest: The engine's manifest.
        session: The opened engine.
        relaxed: The opened second engine, where the manifest routes timesteps to one.
        flow: Whether the pipeline's scheduler is of a flow, whose first timestep is the schedule's length; the family may be of either process.
        lora_factors: Scales of the layers with an adapter branch, from `edm_deploy.adapters.site_weights.site_factors`; None for none.
    """

    def __new__(cls, manifest: Manifest, *_: object, **__: object) -> Self:
        """An instance of a subclass that diffusers' pipelines accept. The family makes it: importing this package must not import diffusers."""
        created: Self = super().__new__(family_named(manifest.family).denoiser_class(cls))  # type: ignore[assignment]
        return created

    def __init__(
        self,
        manifest: Manifest,
        session: Session,
        relaxed: Session | None = None,
        *,
        flow: bool = False,
        lora_factors: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.manifest = manifest
        self.session = session
        self._sessions = [opened for opened in (session, relaxed) if opened is not None]
        self._correction = Correction.from_json(manifest.correction) if manifest.correction else None
        self._set_state(self._no_adapters(lora_factors))
        self.family: Family = family_named(manifest.family)
        self.config = self.family.freeze_config(manifest.config)
        # A table of embeddings ends with the schedule; other embeddings are functions of any timestep.
        beyond = self.family.flow or (flow and self.family.embedded_timesteps(manifest.config) is None)
        self._checks = InputChecks(manifest, self.family, self.device, manifest.num_train_timesteps - (0 if beyond else 1))
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

        Samples of one batch may have different timesteps. Where an input of a sample holds NaN or infinity, the prediction of that sample is NaN, and those
        of the others are not affected.

        Raises:
            InputError: An input's dtype, device or shape is not what the engine was built for, a timestep is outside the schedule, a label is none of the
                model's, an argument is passed twice or is one too many, or the engine is closed.
            UnsupportedError: An argument has no input in the engine.
        """
        arguments = self.family.arguments(args, kwargs)
        inputs = self.family.bind(self.manifest.config, (), arguments)
        prediction = self.run(inputs).to(inputs[SAMPLE].dtype)
        return self.family.output(prediction) if arguments.get("return_dict", True) else (prediction,)

    @torch.no_grad()
    def run(self, inputs: Mapping[str, Any]) -> Tensor:
        """The graph's output for graph inputs by name; one timestep may be given for all samples.

        Raises:
            InputError: As `forward`.
        """
        checked = self._checks.converted(inputs)
        run, state = self._current  # one read: another thread may load an adapter meanwhile
        if self.manifest.adapters is None:
            return nan_where_not_finite(run(checked), checked)
        scales = state.scales(len(checked[SAMPLE]), self.manifest.adapters.rank).to(self.device, self.manifest.torch_dtype)
        return nan_where_not_finite(run(checked | {SLOT_SCALES: scales}), checked)

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
        own = self.device
        if device is not None and (device.type != own.type or not (None in (device.index, own.index) or device.index == own.index)):
            raise InputError(
                f"This engine runs on {self.device}; it cannot move to {device}. Open it with load_denoiser(..., device={str(device)!r})."
            )
        return self

    def cuda(self, device: int | torch.device | None = None) -> EngineDenoiser:
        """As `to("cuda")`."""
        return self.to(torch.device("cuda", device) if isinstance(device, int) else device or "cuda")

    def cpu(self) -> EngineDenoiser:
        """As `to("cpu")`."""
        return self.to("cpu")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Raises UnsupportedError: copying and pickling are refused."""
        raise UnsupportedError(
            "An opened engine cannot be copied or pickled: it holds threads and memory of its backend. "
            "Open its directory again with load_denoiser, in each process that needs it."
        )

    def save_pretrained(self, *_: object, **__: object) -> NoReturn:
        """Raises UnsupportedError: an engine is saved by building it."""
        raise UnsupportedError(
            "An engine cannot be saved with its pipeline. Copy the directory that build-engine wrote, with --with-pipeline if the other components are "
            "to be in it, and open the pipeline with load_pipeline."
        )

    def _state(self) -> SlotState:
        return self._current[1]

    def _set_state(self, state: SlotState) -> None:
        run = route_by_timestep([self._runs(opened, state.weights) for opened in self._sessions], self.manifest.engine_of_timestep)
        self._current = (run if self._correction is None else self._correction.around(run), state)

    def _runs(self, session: Session, weights: Mapping[str, Tensor]) -> DenoiseFn:
        """A session as a function. Where routing leaves fewer samples than the profile's minimum, the last sample is repeated.

        Args:
            session: The session.
            weights: Its adapter weights by input, the same tensors in every call, so that a session need not set them again.
        """
        minimum = self.manifest.profile.get("batch", ShapeRange(1, 1, 1)).min

        def run(inputs: Mapping[str, Tensor]) -> Tensor:
            contiguous = {name: value.contiguous() for name, value in filled_batch(inputs, minimum).items()}
            return session.run({**contiguous, **weights})[self.manifest.outputs[0]][: len(inputs[SAMPLE])]

        return run
