"""Serving without in-flight batching: whole requests, one at a time or in static batches, by the same engine, samples and schedulers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable

import torch

from edm_deploy.serving.counters import Counters
from edm_deploy.serving.interface import Accepted, Event, Finished, ImageRequest, Stats
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.sample import Sample, advance


class WholeRequests:
    """Takes up to `most` waiting requests together and computes them to the end; what arrives meanwhile waits, as with Ray Serve's `serve.batch`.

    A request is answered when its own steps are done, and its rows leave the batch.

    Args:
        model: The model, which is not closed. Requests are of one image and one size.
        most: Rows of a batch.
        shrinks: Whether a call has only the rows that are left; else always `model.slots`.
    """

    def __init__(self, model: ServedModel, most: int, *, shrinks: bool) -> None:
        self.model, self.most, self.shrinks = model, most, shrinks
        self._waiting: deque[tuple[ImageRequest, Callable[[Event | BaseException], None]]] = deque()
        self._running = 0
        self._counters = Counters(slots=most)
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    async def submit(self, request: ImageRequest) -> AsyncIterator[Event]:
        """As `ImageService.submit`."""
        events: asyncio.Queue[Event | BaseException] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(event: Event | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self._changed:
            self._waiting.append((request, emit))
            self._changed.notify()
        yield Accepted(ahead=0, memory=0)
        event = await events.get()
        if isinstance(event, BaseException):
            raise event
        yield event

    async def stats(self) -> Stats:
        """Counters."""
        with self._changed:
            waiting, running = len(self._waiting), self._running
            return self._counters.stats(requests=waiting + running, waiting=waiting, running=running, memory=0)

    def close(self) -> None:
        """End once the running batch is done."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed:
                    return
                rows = max(1, self.model.conditioning.rows(self._waiting[0][0]))
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), max(1, self.most // rows)))]
                self._running = len(taken)
            try:
                self._compute(taken)
            except Exception as err:  # reported to every caller: a benchmark that fails ends
                for _, emit in taken:
                    emit(err)

    @torch.no_grad()
    def _compute(self, taken: list[tuple[ImageRequest, Callable[[Event | BaseException], None]]]) -> None:
        running: list[tuple[ImageRequest, Callable[[Event | BaseException], None], Sample]] = []
        for request, emit in taken:
            running.append((request, emit, self.model.start(request, self.model.prepare(request), 0)))
        while running:
            start = time.perf_counter()
            samples = [sample for *_, sample in running]
            rows = sum(len(sample.rows) for sample in samples)
            predictions = self.model.predict(samples, pad=not self.shrinks)
            seconds = time.perf_counter() - start
            advance(samples, predictions)
            with self._changed:
                self._counters.add_call(rows, time.perf_counter() - start, seconds)
            for request, emit, sample in running:
                if sample.done:
                    emit(Finished(image=0, seed=request.seed, pixels=self.model.pixels(sample.latents, request)))
            running = [entry for entry in running if not entry[2].done]
            with self._changed:
                self._running = len(running)
