"""Requests, events, statistics, and the interface of what serves them. All of it can be pickled, so that a replica may be in another process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edm_deploy.errors import EdmDeployError
from edm_deploy.serving.histogram import Counts

Pixels = NDArray[np.uint8]  # [H, W, C], C is 1 or 3
State = Literal["ready", "draining", "changed", "failed"]


class BusyError(EdmDeployError):
    """The queue is full; a later request may be accepted.

    Args:
        message: Found, expected and remedy.
        retry_after: Seconds after which a place is expected to be free.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message, retry_after)
        self.retry_after = retry_after

    def __str__(self) -> str:
        return str(self.args[0])


class UnavailableError(EdmDeployError):
    """The replica takes no requests: it is draining or closed, its engine has failed, or the engine's directory has changed."""


class EngineError(EdmDeployError):
    """The engine failed while it computed this request."""


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """Images of one prompt or label. What is None is the model's default.

    Attributes:
        id: Distinct among the requests of a replica that have not ended.
        count: Number of images.
        seed: Seed of the first image; image i has `seed + i`.
        steps: Inference steps of the whole schedule.
        scheduler: Short name as in `edm_deploy.pipelines.schedulers.SCHEDULERS`.
        prompt, negative_prompt: For text-conditional models.
        label: Class of all images, for class-conditional models; None draws one for each image from its seed.
        guidance: Guidance scale; 1 is off.
        height, width: In pixels.
        picture: Start picture, uint8 [height, width, C]; None starts from noise.
        strength: Share of the schedule that is computed from a start picture on, above 0 to 1.
        previews: Previews of each image while it is computed, at even distances.
        progress: Whether to report each step.
    """

    id: str
    count: int = 1
    seed: int = 0
    steps: int = 20
    scheduler: str | None = None
    prompt: str | None = None
    negative_prompt: str | None = None
    label: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    picture: Pixels | None = None
    strength: float = 0.8
    previews: int = 0
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class Accepted:
    """The first event of a request.

    Attributes:
        ahead: Requests that were accepted before and have not ended.
        memory: Bytes that the request holds at most.
    """

    ahead: int
    memory: int


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A step of one image has been computed: `step` of `steps`."""

    image: int
    step: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Preview:
    """The estimate of an image after a step; `number` counts its previews from 0. A preview may be left out where decoding is slower than sampling."""

    image: int
    number: int
    pixels: Pixels


@dataclass(frozen=True, kw_only=True)
class Finished:
    """One image of a request."""

    image: int
    seed: int
    pixels: Pixels


Event = Accepted | Progress | Preview | Finished


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a served model is and takes.

    Attributes:
        name: Its name among the models of a server.
        family: Class of the denoiser in diffusers.
        scheme: Bits of the majority of sites, `W4A4`.
        backend: Backend of the engine.
        digest: sha256 of the engine's manifest.
        slots: Rows of each call of the engine.
        size: Height and width of an image in pixels, where a request states none.
        unit: Height and width are multiples of this, in pixels.
        schedulers: Short names of the schedulers, the default first.
        takes_prompt: Whether a prompt is required.
        takes_picture: Whether images may start from a picture.
        classes: Number of class labels; None where the model takes none.
        guidance: The default guidance scale; None where the model is not guided.
    """

    name: str
    family: str
    scheme: str
    backend: str
    digest: str
    slots: int
    size: tuple[int, int]
    unit: int
    schedulers: tuple[str, ...]
    takes_prompt: bool
    takes_picture: bool
    classes: int | None
    guidance: float | None


@dataclass(frozen=True, kw_only=True)
class Stats:
    """A replica's counters since it was started, and its state.

    Attributes:
        state: `ready`, `draining`, `changed` (the engine's directory), or `failed`.
        reason: Why it is not ready; else empty.
        slots: Rows of each call of the engine.
        occupied: Rows of the latest call that samples used; 0 when idle.
        requests: Accepted requests that have not ended.
        waiting: Images of them that no call has computed a step of.
        running: Images of them that have been started.
        memory: Bytes that the accepted requests hold at most.
        calls: Calls of the engine.
        rows: Rows of all calls that samples used; occupancy is rows / (calls * slots).
        finished, cancelled, failed: Requests that have ended, by how they ended.
        images: Images that were finished.
        step_seconds: Wall time of a tick: a call, with what the loop does before and after it.
        engine_seconds: Wall time of the call alone.
        queue_seconds: Time from a request's acceptance to the first call that computes one of its images.
        request_seconds: Time from a request's acceptance to its last image.
    """

    state: State = "ready"
    reason: str = ""
    slots: int = 0
    occupied: int = 0
    requests: int = 0
    waiting: int = 0
    running: int = 0
    memory: int = 0
    calls: int = 0
    rows: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    images: int = 0
    step_seconds: Counts = field(default_factory=Counts)
    engine_seconds: Counts = field(default_factory=Counts)
    queue_seconds: Counts = field(default_factory=Counts)
    request_seconds: Counts = field(default_factory=Counts)


class ImageService(Protocol):
    """What serves the images of one model: a `Replica` in this process, or several elsewhere."""

    async def card(self) -> ModelCard:
        """What the model is and takes."""

    def submit(self, request: ImageRequest) -> AsyncIterator[Event]:
        """The events of a request: `Accepted`, then those of its images in any order of images, `Finished` once for each.

        An iterator that is closed before its end cancels the request.

        Raises:
            InputError: The model or the limits do not allow the request; in place of `Accepted`.
            BusyError, UnavailableError: In place of `Accepted`; UnavailableError also later, where the replica is closed.
            EngineError: The engine failed.
        """

    async def cancel(self, request_id: str) -> bool:
        """End a request without further images; whether there was one. Its iterator ends with UnavailableError."""

    async def stats(self) -> Stats:
        """Counters and state."""

    async def drain(self, timeout: float) -> bool:
        """Take no further requests and wait for the accepted ones; after `timeout` seconds they end with UnavailableError. Whether all were finished."""
