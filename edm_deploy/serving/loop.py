"""The loop of in-flight batching: one thread that calls the engine, with samples of any requests at every call."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from edm_deploy.errors import EdmDeployError, first_line
from edm_deploy.serving.counters import Counters, Ending
from edm_deploy.serving.interface import EngineError, Event, Finished, ImageRequest, Preview, Progress, Stats, UnavailableError
from edm_deploy.serving.model import Prepared, ServedModel
from edm_deploy.serving.sample import Sample, advance
from edm_deploy.serving.selection import Candidate, order_of, select

log = logging.getLogger(__name__)

FAILURES = 3  # calls of the engine that fail one after the other before the loop gives up


@dataclass(eq=False)
class Job:
    """A request that has been accepted and has not ended.

    Attributes:
        request: The request.
        emit: Receives its events, and the exception that ends it early; called from any thread.
        memory: Bytes that it holds at most.
        accepted: Time of acceptance, in seconds of `time.perf_counter`.
        arrival: Calls of the engine before it was accepted.
        left: Images that have not been handed over.
        called: Whether a call has computed one of its images.
        ended: Whether it was finished, cancelled, or has failed.
    """

    request: ImageRequest
    emit: Callable[[Event | BaseException], None]
    memory: int
    accepted: float
    arrival: int
    left: int
    called: bool = False
    ended: bool = False


@dataclass(eq=False)
class _Image:
    """An image of a job that waits for a call; its sample is made when it is first selected."""

    job: Job
    prepared: Prepared
    index: int
    order: float
    rows: int
    key: Hashable
    sample: Sample | None = None
    previews: int = 0
    decoding: bool = False  # a preview of it is being decoded


class Loop:
    """Computes jobs until it is closed. Prompts and pictures are encoded in a second thread, and images decoded in a third, while the engine runs.

    Args:
        model: The model; the loop is the only caller of its engine, and closes it.
        pad: Whether every call has `model.slots` rows, as in `ServedModel.predict`; else as many as the samples have.
    """

    def __init__(self, model: ServedModel, *, pad: bool = True) -> None:
        self.model = model
        self.pad = pad
        self.failure = ""  # why the loop has given up
        self._jobs: dict[str, Job] = {}
        self._images: list[_Image] = []
        self._changed = threading.Condition()  # guards the two above and what follows
        self._closed = False
        self._waited: dict[Hashable, int] = {}
        self._counters = Counters(slots=model.slots)
        self._failures = 0
        self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{model.card.name}-encoder")
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{model.card.name}-decoder")
        self._thread = threading.Thread(target=self._run, name=f"{model.card.name}-loop", daemon=True)
        self._thread.start()

    def add(self, request: ImageRequest, memory: int, emit: Callable[[Event | BaseException], None]) -> Job:
        """Accept a checked request. Raises UnavailableError where the loop has ended."""
        job = Job(request, emit, memory, time.perf_counter(), self._counters.calls, request.count)
        with self._changed:
            if self._closed or self.failure:
                raise UnavailableError(self.failure or "The replica is closed.")
            self._jobs[request.id] = job
            self._encoder.submit(self._prepare, job)
        return job

    def end(self, request_id: str, reason: BaseException) -> bool:
        """End a request early, with `reason` as its last event; whether there was one."""
        with self._changed:
            job = self._jobs.get(request_id)
            if job is None:
                return False
            self._forget(job, "cancelled" if isinstance(reason, UnavailableError) else "failed")
        job.emit(reason)
        return True

    @property
    def jobs(self) -> list[Job]:
        """Requests that have not ended."""
        with self._changed:
            return list(self._jobs.values())

    def stats(self) -> Stats:
        """Counters; the state is that of the replica."""
        with self._changed:
            waiting = sum(job.left for job in self._jobs.values())
            running = sum(image.sample is not None for image in self._images)
            memory = sum(job.memory for job in self._jobs.values())
            return self._counters.stats(requests=len(self._jobs), waiting=waiting - running, running=running, memory=memory)

    def backlog(self) -> float:
        """Seconds that the accepted requests are expected to take."""
        with self._changed:
            calls = sum(
                image.rows * (len(image.prepared.schedule) - (image.sample.position if image.sample else 0)) for image in self._images
            )
            return calls / self.model.slots * self._counters.step.counts().mean

    def close(self) -> None:
        """End every request with UnavailableError, and release the engine. Closing again has no effect."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        for job in self.jobs:
            self.end(job.request.id, UnavailableError("The server has been stopped before this request was finished. Send it again later."))
        for threads in (self._encoder, self._decoder):
            threads.shutdown(wait=True, cancel_futures=True)
        self.model.close()

    def _prepare(self, job: Job) -> None:
        """Encode a request, and put its images in the queue."""
        if job.ended:
            return
        try:
            prepared = self.model.prepare(job.request)
            rows = self.model.conditioning.rows(job.request)
            key = self.model.key(job.request, prepared, prepared.schedule.values[0])
        except Exception as err:  # an encoder's: reported to the caller, and the loop goes on
            self.end(job.request.id, _reported(err, "The text encoder or the VAE's encoder failed"))
            return
        steps = len(prepared.schedule)
        images = [_Image(job, prepared, index, order_of(job.arrival, index, steps), rows, key) for index in range(job.request.count)]
        with self._changed:
            if not job.ended:
                self._images += images
                self._changed.notify_all()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._images)
                    if self._closed:
                        return
                self._tick()
        except BaseException as err:  # a fault of ours: every request is answered, and none is taken any more
            log.exception("the serving loop of %s ended", self.model.card.name)
            self._give_up(f"The serving loop ended: {type(err).__name__}: {first_line(err)}. Restart the server.")

    @torch.no_grad()
    def _tick(self) -> None:
        """One call of the engine."""
        start = time.perf_counter()
        with self._changed:
            chosen = self._chosen()
        images = [image for image in chosen if self._started(image)]
        if not images:
            return
        samples = [image.sample for image in images if image.sample is not None]
        called = time.perf_counter()
        try:
            predictions = self.model.predict(samples, pad=self.pad)
            seconds = time.perf_counter() - called
            advance(samples, predictions)
        except Exception as err:  # a backend's or a scheduler's: reported to the callers whose samples were in the call
            self._call_failed(images, err)
            return
        self._failures = 0
        for image, sample in zip(images, samples, strict=True):
            self._report(image, sample)
        with self._changed:  # after the scheduler's steps, which are part of a tick
            self._counters.add_call(sum(image.rows for image in images), time.perf_counter() - start, seconds)

    def _chosen(self) -> list[_Image]:
        """The images of the next call, under the lock."""
        indices = select([Candidate(image.order, image.rows, image.key) for image in self._images], self.model.slots, self._waited)
        chosen = [self._images[index] for index in indices]
        if chosen:
            keys = {image.key for image in self._images}
            self._waited = {key: self._waited.get(key, 0) + 1 for key in keys if key != chosen[0].key}
        now = time.perf_counter()
        for image in chosen:
            if not image.job.called:
                image.job.called = True
                self._counters.queue.add(now - image.job.accepted)
        return chosen

    def _started(self, image: _Image) -> bool:
        """Make the image's sample where it has none; False ends its request."""
        if image.sample is None:
            try:
                image.sample = self.model.start(image.job.request, image.prepared, image.index)
            except Exception as err:  # a scheduler's
                self.end(image.job.request.id, _reported(err, "The image could not be started"))
                return False
        return True

    def _report(self, image: _Image, sample: Sample) -> None:
        job, steps = image.job, len(image.prepared.schedule)
        if job.ended:
            return
        if job.request.progress:
            job.emit(Progress(image=image.index, step=sample.position, steps=steps))
        if sample.done:
            with self._changed:
                self._images = [other for other in self._images if other is not image]
            self._decoder.submit(self._finish, image, sample.latents)
            return
        image.key = self.model.key(job.request, image.prepared, sample.timestep)
        due = (image.previews + 1) * steps // (job.request.previews + 1)
        if image.previews < job.request.previews and sample.position >= due:
            if not image.decoding:  # else decoding is slower than sampling, and this preview is left out
                image.decoding = True
                self._decoder.submit(self._preview, image, image.previews, sample.estimate())
            image.previews += 1

    def _preview(self, image: _Image, number: int, estimate: torch.Tensor) -> None:
        try:
            if not image.job.ended:
                image.job.emit(Preview(image=image.index, number=number, pixels=self.model.pixels(estimate, image.job.request)))
        except Exception as err:  # the decoder's
            self.end(image.job.request.id, _reported(err, "The VAE failed"))
        finally:
            image.decoding = False

    def _finish(self, image: _Image, latents: torch.Tensor) -> None:
        job = image.job
        if job.ended:
            return
        try:
            if not bool(latents.isfinite().all()):
                raise EngineError("The engine's prediction holds NaN or infinity. Choose another scheduler or more steps.")
            pixels = self.model.pixels(latents, job.request)
        except Exception as err:  # the decoder's
            self.end(job.request.id, _reported(err, "The VAE failed"))
            return
        with self._changed:
            if job.ended:
                return
            job.left -= 1
            self._counters.images += 1
            if job.left == 0:
                self._counters.request.add(time.perf_counter() - job.accepted)
                self._forget(job, "finished")
        job.emit(Finished(image=image.index, seed=job.request.seed + image.index, pixels=pixels))

    def _call_failed(self, images: list[_Image], err: Exception) -> None:
        self._failures += 1
        log.error("the engine of %s failed: %s: %s", self.model.card.name, type(err).__name__, first_line(err))
        for request_id in {image.job.request.id for image in images}:
            self.end(request_id, _reported(err, "The engine failed"))
        if self._failures >= FAILURES:
            self._give_up(f"The engine failed {FAILURES} times in a row: {first_line(err)}. Restart the server.")

    def _give_up(self, failure: str) -> None:
        with self._changed:
            self.failure = failure
        for job in self.jobs:
            self.end(job.request.id, UnavailableError(failure))

    def _forget(self, job: Job, how: Ending) -> None:
        """Remove a job and its images, under the lock."""
        job.ended = True
        self._jobs.pop(job.request.id, None)
        self._images = [image for image in self._images if image.job is not job]
        self._counters.ended[how] += 1


def _reported(err: Exception, what: str) -> EdmDeployError:
    """`err` as an error that a caller may see."""
    return err if isinstance(err, EdmDeployError) else EngineError(f"{what}: {type(err).__name__}: {first_line(err)}.")
