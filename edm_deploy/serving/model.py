"""One engine and its pipeline, opened to be served: checks of requests, schedules, calls of fixed size, images."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.network.family import SAMPLE, TIMESTEP, Config
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.numerics.seeds import LARGEST_SEED, check_seed
from edm_deploy.pipelines.decoding import Decoder, decoder_at
from edm_deploy.pipelines.rebuild import home_of_components, index_with_components, pipeline_guidance
from edm_deploy.pipelines.schedulers import default_scheduler, scheduler_from_config, scheduler_named, schedulers_for
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import NAME, ShapeRange
from edm_deploy.serving.conditioning import Conditioning, Encoded
from edm_deploy.serving.interface import ImageRequest, ModelCard, Pixels
from edm_deploy.serving.sample import Sample, Schedule
from edm_deploy.storage.directories import INDEX_FILE, SCHEDULER_FILE, other_components, read_json, sha256_of

DEFAULT_SLOTS = 8
KEPT_SCHEDULES = 256  # each a few kilobytes
LATENTS_OF_A_STATE = 10  # of an image: its latents, input, prediction, and what a multistep scheduler keeps (PNDM: six)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A request whose prompt and start picture have been encoded.

    Attributes:
        schedule: Of all of its images.
        encoded: Its conditioning.
        shape: Shape of a sample without the batch.
        clean: The start picture as a sample, float32 [1, ...]; None starts from noise.
    """

    schedule: Schedule
    encoded: Encoded
    shape: tuple[int, ...]
    clean: Tensor | None


class ServedModel:
    """An engine, the text encoders and the VAE of its pipeline, and its schedulers.

    A padded call has `slots` rows; those that no sample uses repeat the last one. So it has always the same shapes for one size of images, and a row's
    result depends on its position and its own inputs alone.

    Args:
        directory: Directory that `edm-deploy build-engine` wrote.
        name: Name of the model.
        slots: Rows of each call at most; None is 8, or the largest batch of the engine's profile if that is less.
        source: Directory or hub id of the pipeline that provides text encoders and VAE; None as in `load_pipeline`.
        device: Device of the engine; None selects the backend's default.
        threads: CPU threads of the engine; None keeps the number that it was built with.

    Raises:
        ArtifactError, UnsupportedError: As `load_pipeline`; or the model takes an input that no request has.
        InputError: The engine takes no batch of `slots`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        name: str,
        slots: int | None = None,
        source: str | Path | None = None,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.directory = directory
        self.denoiser = load_denoiser(directory, device=device, threads=threads)
        self.family, self.manifest = self.denoiser.family, self.denoiser.manifest
        self.config: Config = self.manifest.config
        self._batch = self.manifest.profile.get("batch", ShapeRange(1, 1, 1))
        self.slots = self._slots(slots)
        index = index_with_components(directory, self.family, self.config, source)
        others = other_components(index, self.family.component)
        home = home_of_components(directory, index, self.family.component, source) if others else None
        self.conditioning = Conditioning(self.manifest, self.family, home, self.denoiser.device, pipeline_guidance(index))
        self.decoder = self._decoder(home, index)
        self._scheduler_config = read_json(directory / SCHEDULER_FILE, what="engine")
        self._own_scheduler = str(read_json(directory / INDEX_FILE, what="engine")["scheduler"][1])
        self._default = default_scheduler(directory)
        self._schedulers: dict[str | None, Any] = {}
        self._schedules: dict[tuple[str | None, int, float], Schedule] = {}  # a schedule is not modified, and takes milliseconds to make
        self._engine_of_timestep = self.manifest.engine_of_timestep
        self.card = self._card(name)

    def check(self, request: ImageRequest) -> None:
        """Raises InputError or UnsupportedError where the model cannot compute a request; the message names the field."""
        if request.count < 1:
            raise InputError(f"count is {request.count}, expected 1 or more.")
        if not 0 < request.strength <= 1:
            raise InputError(f"strength is {request.strength:g}, expected a number above 0, at most 1.")
        check_seed(request.seed)
        if request.seed + request.count - 1 > LARGEST_SEED:
            raise InputError(f"seed {request.seed} leaves no seeds for {request.count} images. Choose a smaller seed.")
        self.conditioning.check(request)
        if self.conditioning.rows(request) > self.slots:
            raise InputError(
                "guidance takes two rows an image, and the server has one slot. Pass guidance 1, or start it with more --slots."
            )
        self._check_size(request)
        if request.picture is not None and not self.card.takes_picture:
            raise UnsupportedError(f"This {self.family.class_name} cannot start from a picture here.")
        self.schedule(request)

    def schedule(self, request: ImageRequest) -> Schedule:
        """The schedule of a request.

        Raises:
            InputError, UnsupportedError: The scheduler is unknown, does not fit the model, or has no such number of steps.
        """
        name = request.scheduler or self._default
        if name not in self._schedulers:
            made = (
                scheduler_named(name, self._scheduler_config)
                if name
                else scheduler_from_config(self._own_scheduler, self._scheduler_config)
            )
            self._schedulers[name] = made
        strength = 1.0 if request.picture is None else request.strength
        key = name, request.steps, strength
        if key not in self._schedules:
            if len(self._schedules) >= KEPT_SCHEDULES:
                self._schedules.clear()
            self._schedules[key] = Schedule(self._schedulers[name], request.steps, self.family.sigmas(request.steps), strength=strength)
        return self._schedules[key]

    def prepare(self, request: ImageRequest) -> Prepared:
        """Encode a checked request's prompt and start picture; takes as long as text encoder and VAE do."""
        sized = self.sized(request)
        clean = None
        if request.picture is not None:
            pixels = torch.tensor(request.picture).permute(2, 0, 1)[None].float() / 127.5 - 1
            channels = self.family.latent_shape(self.config)[0] if self.decoder.vae is None else 3
            pixels = pixels.mean(1, keepdim=True) if channels == 1 else pixels.expand(-1, 3, -1, -1)
            clean = self.decoder.sample_of(pixels.to(self.denoiser.device)).contiguous()
        shape = tuple(self.family.latent_shape(sized))
        return Prepared(schedule=self.schedule(request), encoded=self.conditioning.encode(request, sized), shape=shape, clean=clean)

    def start(self, request: ImageRequest, prepared: Prepared, image: int) -> Sample:
        """Image `image` of a request, before its first call."""
        generator = torch.Generator().manual_seed(request.seed + image)
        noise = torch.randn((1, *prepared.shape), generator=generator).to(self.denoiser.device)
        schedule, clean = prepared.schedule, prepared.clean
        latents = noise * schedule.init_sigma if clean is None else schedule.noised(clean, noise)
        rows = self.conditioning.rows_of(prepared.encoded, request, generator)
        return Sample(schedule, latents, generator, rows, prepared.encoded.scale)

    def key(self, request: ImageRequest, prepared: Prepared, timestep: float) -> Hashable:
        """Samples with the same key may share a call: those of one shape of inputs, whose timesteps are routed to one engine."""
        shapes = tuple((name, tuple(value.shape)) for name, value in prepared.encoded.conditional.items())
        if self._engine_of_timestep is None:
            return prepared.shape, shapes
        return prepared.shape, shapes, int(table_rows(self._engine_of_timestep, torch.tensor([timestep])))

    @torch.no_grad()
    def predict(self, samples: Sequence[Sample], *, pad: bool = True) -> list[Tensor]:
        """One call of the engine: the prediction of each sample's rows, float32 [R, ...] each.

        Args:
            samples: Of one key, and of `slots` rows at most together.
            pad: Whether the call has `slots` rows; else as many as the samples have, and the engine's profile asks for.
        """
        rows = [row for sample in samples for row in sample.inputs()]
        size = self.slots if pad else max(len(rows), self._batch.min)
        filled = [*rows, *[rows[-1]] * (size - len(rows))]
        inputs = {name: torch.cat([row[name] for row in filled]) for name in rows[0]}
        inputs[TIMESTEP.name] = inputs[TIMESTEP.name].to(self.denoiser.device)
        output = self.family.prediction(self.config, self.denoiser.run(inputs)).float()
        return list(torch.split(output[: len(rows)], [len(sample.rows) for sample in samples]))

    def warm_up(self, *, pad: bool = True) -> None:
        """Call the engine with images of the default size, once for each number of rows that calls have: backends compile at the first call of a shape."""
        shapes = self._sizes(self.config)
        for rows in [self.slots] if pad else range(self._batch.min, self.slots + 1):
            inputs = {}
            for declared in self.manifest.inputs:
                dims = [dim if isinstance(dim, int) else rows if dim == "batch" else shapes[dim] for dim in declared.dims]
                inputs[declared.name] = torch.zeros(dims, dtype=declared.dtype(self.manifest.torch_dtype), device=self.denoiser.device)
            self.denoiser.run(inputs)

    def pixels(self, latents: Tensor, request: ImageRequest) -> Pixels:
        """The image of a finished sample [1, ...], uint8 [H, W, C]."""
        images = replace(self.decoder, config=self.sized(request)).images(latents)
        shown = (images[0] / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        return np.ascontiguousarray(shown.permute(1, 2, 0).cpu().numpy())

    def memory(self, request: ImageRequest) -> int:
        """Bytes that a request holds at most until its images are handed over: states, conditioning, images and previews."""
        height, width = self.size(request)
        elements = 1
        for size in self.family.latent_shape(self.sized(request)):
            elements *= size
        pictures = height * width * 3 * (1 + request.previews + (5 if request.picture is not None else 0))
        return self.conditioning.memory(request) + request.count * (elements * 4 * LATENTS_OF_A_STATE + pictures)

    def size(self, request: ImageRequest) -> tuple[int, int]:
        """Height and width of a request's images, in pixels."""
        height, width = self.card.size
        return request.height or request.width or height, request.width or request.height or width

    def sized(self, request: ImageRequest) -> Config:
        """The model's config with the `sample_size` of a request."""
        if self.size(request) == self.card.size:
            return self.config
        factor = self.decoder.pixels_per_sample
        return {**self.config, "sample_size": [side // factor for side in self.size(request)]}

    def close(self) -> None:
        """Release the engine's memory."""
        self.denoiser.close()

    def _check_size(self, request: ImageRequest) -> None:
        for name, side in zip(("height", "width"), self.size(request), strict=True):
            if side < self.card.unit or side % self.card.unit:
                raise InputError(f"{name} {side}: expected a multiple of {self.card.unit} pixels for this model.")
        height, width = self.size(request)
        for dim, size in self._sizes(self.sized(request)).items():
            allowed = self.manifest.profile.get(dim)
            if dim != "tokens" and allowed is not None and not allowed.min <= size <= allowed.max:
                raise InputError(
                    f"size {width}x{height} is outside the engine's profile: its {dim} would be {size}, expected {allowed.min} to {allowed.max}. "
                    "Choose another size."
                )

    def _sizes(self, config: Config) -> Mapping[str, int]:
        dims = self.family.inputs(config)[0].dims[1:]
        sizes = {dim: size for dim, size in zip(dims, self.family.sample_shape(config), strict=True) if isinstance(dim, str)}
        return {**self.family.sizes(self.config), **sizes}

    def _slots(self, slots: int | None) -> int:
        allowed = self._batch
        chosen = max(allowed.min, min(DEFAULT_SLOTS, allowed.max)) if slots is None else slots
        if not allowed.min <= chosen <= allowed.max:
            raise InputError(
                f"{chosen} slots: the engine in {self.directory} takes batches of {allowed.min} to {allowed.max}. "
                f"Pass --slots {min(max(chosen, allowed.min), allowed.max)}, or build it again with --batch 1:{chosen}:{chosen}."
            )
        return chosen

    def _decoder(self, home: Path | None, index: Mapping[str, Any]) -> Decoder:
        decoder = decoder_at(home, index, self.family, self.config)
        if decoder.kind == "latents":
            raise UnsupportedError(
                f"{self.directory} samples latents, and its pipeline has no VAE to decode them. Name one that has with --source."
            )
        if decoder.vae is not None:
            decoder.vae.to(self.denoiser.device)
        return decoder

    def _card(self, name: str) -> ModelCard:
        height, width = self.family.sample_size(self.config)
        factor = self.decoder.pixels_per_sample
        fitting = schedulers_for(self._scheduler_config)
        own = next(
            (short for short in fitting if type(scheduler_named(short, self._scheduler_config)).__name__ == self._own_scheduler), None
        )
        first = self._default or own
        shape = next(declared for declared in self.manifest.inputs if declared.name == SAMPLE).dims
        return ModelCard(
            name=name,
            family=self.family.class_name,
            scheme=self.manifest.scheme,
            backend=str(self.manifest.backend),
            digest=sha256_of(self.directory / NAME),
            slots=self.slots,
            size=(height * factor, width * factor),
            unit=factor * self.family.size_multiple(self.config),
            schedulers=tuple(sorted(fitting, key=lambda short: short != first)),
            takes_prompt=self.conditioning.takes_prompt,
            takes_picture=len(shape) == 4,
            classes=self.conditioning.classes,
            guidance=None if self.conditioning.kind == "none" else self.conditioning.scale,
        )
