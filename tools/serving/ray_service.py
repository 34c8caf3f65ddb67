"""The images of one model, served by the replicas of Ray Serve: what was accepted by one that dies is computed by another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import fields, replace
from typing import Any

from ray.exceptions import RayActorError, RayError

from edm_deploy.serving.histogram import Counts
from edm_deploy.serving.interface import Accepted, Event, Finished, ImageRequest, ModelCard, Stats, UnavailableError
from edm_deploy_tools.serving.ray_engines import Failure

ATTEMPTS = 5  # replicas that a request is given to, one after the other as they die
KEPT = ("state", "reason", "slots")  # of a replica; the other fields of Stats are added up


class RayService:
    """An `ImageService` of the replicas behind a handle.

    A request whose replica dies is submitted again: its seeds give the same images, and those that were handed over are left out.

    Args:
        name: Name of the model.
        handle: Ray Serve's handle of the deployment.
    """

    def __init__(self, name: str, handle: Any) -> None:  # Any: Ray's handle has the methods of the deployment
        self.name, self._handle = name, handle.options(multiplexed_model_id=name)
        self._running: dict[str, Any] = {}
        self.closed = ""  # why no request is taken

    async def card(self) -> ModelCard:
        """What the model is and takes."""
        try:
            card = await self._handle.card.remote()
        except RayError as err:
            raise UnavailableError("No replica could be asked what the model is. Try again later.") from err
        if isinstance(card, Failure):
            raise card.error
        return card  # type: ignore[no-any-return]  # of the handle

    async def submit(self, request: ImageRequest) -> AsyncIterator[Event]:
        """As `ImageService.submit`."""
        if self.closed:
            raise UnavailableError(self.closed)
        accepted, finished = False, set[int]()
        try:
            for attempt in range(ATTEMPTS):
                again = replace(request, id=f"{request.id}-{attempt}" if attempt else request.id)
                response = self._handle.options(stream=True).submit.remote(again)
                self._running[request.id] = response
                try:
                    async for event in response:
                        if isinstance(event, Failure):
                            raise event.error
                        if isinstance(event, Accepted):
                            if accepted:
                                continue
                            accepted = True
                        elif event.image in finished:
                            continue
                        if isinstance(event, Finished):
                            finished.add(event.image)
                        yield event
                except RayActorError:
                    continue
                except RayError as err:
                    raise UnavailableError(f"The replica failed: {type(err).__name__}. Send the request again later.") from err
                if len(finished) == request.count:
                    return
            raise UnavailableError(f"{ATTEMPTS} replicas died while they computed this request. Send it again later.")
        finally:
            running = self._running.pop(request.id, None)
            if running is not None and len(finished) < request.count:
                running.cancel()

    async def cancel(self, request_id: str) -> bool:
        """As `ImageService.cancel`."""
        running = self._running.get(request_id)
        if running is not None:
            running.cancel()
        return running is not None

    async def stats(self) -> Stats:
        """Statistics of all replicas together."""
        try:
            found = await self._handle.broadcast("stats").results_async()
        except (RayError, RuntimeError, TimeoutError) as err:
            return Stats(state="failed", reason=f"No replica answers: {type(err).__name__}.")
        together = added([each[self.name] for each in found if self.name in each])
        return replace(together, state="draining", reason=self.closed) if self.closed else together

    async def drain(self, timeout: float) -> bool:
        """Take no further requests; Ray Serve waits for the accepted ones when the application is deleted."""
        self.closed = "The server is shutting down. Send the request again later."
        return not self._running


def added(replicas: Iterable[Stats]) -> Stats:
    """Statistics of several replicas as one: it is ready where one of them is."""
    known = sorted(replicas, key=lambda each: each.state != "ready")
    if not known:
        return Stats(state="failed", reason="No replica has this model open.")
    sums = {}
    for entry in fields(Stats):
        if entry.name in KEPT:
            continue
        values = [getattr(each, entry.name) for each in known]
        sums[entry.name] = sum(values, Counts()) if isinstance(values[0], Counts) else sum(values)
    return replace(known[0], **sums, slots=sum(each.slots for each in known))
