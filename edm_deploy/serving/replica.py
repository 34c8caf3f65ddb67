"""One engine that serves requests: admission, its loop, and its events for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

from edm_deploy.errors import InputError
from edm_deploy.runtime.manifest import NAME
from edm_deploy.serving.interface import Accepted, BusyError, Event, Finished, ImageRequest, ModelCard, State, Stats, UnavailableError
from edm_deploy.serving.loop import Loop
from edm_deploy.serving.model import ServedModel

POLL = 0.02  # seconds between two looks at what is left while draining


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a replica accepts.

    Attributes:
        queue: Requests that have been accepted and not ended.
        images: Images of a request.
        steps: Steps of a request.
        prompt: Characters of a prompt.
        previews: Previews of an image.
        memory: Bytes that the accepted requests hold at most, in all.
    """

    queue: int = 64
    images: int = 10
    steps: int = 150
    prompt: int = 4000
    previews: int = 10
    memory: int = 4 << 30

    def check(self, request: ImageRequest) -> None:
        """Raises InputError where a request exceeds a limit."""
        texts = max(len(request.prompt or ""), len(request.negative_prompt or ""))
        for name, found, most in (
            ("n", request.count, self.images),
            ("steps", request.steps, self.steps),
            ("prompt length", texts, self.prompt),
            ("previews", request.previews, self.previews),
        ):
            if found > most:
                raise InputError(f"{name} is {found}, expected at most {most} by the server's limits. Choose less.")


class Replica:
    """An `ImageService` in this process. All methods but `close` run in one event loop.

    Args:
        model: An opened model, which the replica closes.
        limits: What it accepts.
        pad: As `Loop`.
    """

    def __init__(self, model: ServedModel, limits: Limits | None = None, *, pad: bool = True) -> None:
        self.model = model
        self.limits = limits or Limits()
        self._files = [model.directory / NAME, *(model.directory / name for name in model.manifest.files)]
        self._signature = self._signed()
        self._draining = False
        self._loop = Loop(model, pad=pad)

    async def card(self) -> ModelCard:
        """What the model is and takes."""
        return self.model.card

    async def submit(self, request: ImageRequest) -> AsyncIterator[Event]:
        """As `ImageService.submit`."""
        accepted = self._admit(request)
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        asyncio_loop = asyncio.get_running_loop()

        def emit(event: Event | BaseException) -> None:
            if not asyncio_loop.is_closed():
                asyncio_loop.call_soon_threadsafe(events.put_nowait, event)

        self._loop.add(request, accepted.memory, emit)
        left = request.count
        try:
            yield accepted
            while left:
                event = await events.get()
                if isinstance(event, BaseException):
                    raise event
                left -= isinstance(event, Finished)
                yield event
        finally:
            if left:
                await self.cancel(request.id)

    async def cancel(self, request_id: str) -> bool:
        """As `ImageService.cancel`."""
        return self._loop.end(request_id, UnavailableError("The request has been cancelled."))

    async def stats(self) -> Stats:
        """As `ImageService.stats`."""
        state, reason = self._state()
        return replace(self._loop.stats(), state=state, reason=reason)

    async def drain(self, timeout: float) -> bool:
        """As `ImageService.drain`."""
        self._draining = True
        deadline = time.perf_counter() + timeout
        while self._loop.jobs and time.perf_counter() < deadline:
            await asyncio.sleep(POLL)
        left = self._loop.jobs
        for job in left:
            self._loop.end(
                job.request.id, UnavailableError("The server is shutting down and could not finish this request. Send it again later.")
            )
        return not left

    def close(self) -> None:
        """End every request and release the engine."""
        self._loop.close()

    def _admit(self, request: ImageRequest) -> Accepted:
        state, reason = self._state()
        if state != "ready":
            raise UnavailableError(reason)
        self.limits.check(request)
        self.model.check(request)
        jobs = self._loop.jobs
        if any(job.request.id == request.id for job in jobs):
            raise InputError(f"A request {request.id!r} has been accepted already and has not ended. Use another id.")
        memory = self.model.memory(request)
        if memory > self.limits.memory:
            raise InputError(
                f"The request needs {memory >> 20} MiB, expected at most {self.limits.memory >> 20}. Ask for fewer or smaller images."
            )
        retry_after = max(1.0, self._loop.backlog() / max(len(jobs), 1))
        if len(jobs) >= self.limits.queue:
            raise BusyError(
                f"{len(jobs)} requests are in the queue, expected fewer than {self.limits.queue}. Try again later.", retry_after
            )
        if memory + sum(job.memory for job in jobs) > self.limits.memory:
            raise BusyError(f"The accepted requests hold all {self.limits.memory >> 20} MiB. Try again later.", retry_after)
        return Accepted(ahead=len(jobs), memory=memory)

    def _state(self) -> tuple[State, str]:
        if self._loop.failure:
            return "failed", self._loop.failure
        if self._draining:
            return "draining", "The server is shutting down. Send the request again later."
        if self._signed() != self._signature:
            return "changed", f"The files in {self.model.directory} have changed since the server opened them. Restart the server."
        return "ready", ""

    def _signed(self) -> list[tuple[int, int] | None]:
        """Size and time of change of each file of the engine; None where it is missing."""
        return [_signature(path) for path in self._files]


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        state = path.stat()
    except OSError:
        return None
    return state.st_size, state.st_mtime_ns
