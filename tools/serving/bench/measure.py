"""Measure how a service bears a load: its capacity when it is saturated, and latencies at a rate of arrivals."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from edm_deploy.serving.interface import Event, Finished, ImageRequest, Stats
from edm_deploy_tools.serving.bench.workload import quantile

POLL = 0.01  # seconds between two readings of the counters


class Service(Protocol):
    """What is measured: a `Replica`, or `WholeRequests`."""

    def submit(self, request: ImageRequest) -> AsyncIterator[Event]:
        """The events of a request."""

    async def stats(self) -> Stats:
        """Counters."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Figures of one service at one load.

    Attributes:
        load: Offered load as a share of the capacity of in-flight batching; None where all requests were there at once.
        offered: Requests that arrive in a second; None as before.
        requests: Number of requests.
        throughput: Requests that were answered in a second, from the first arrival to the last answer.
        p50, p95, p99: Latency in seconds, from the time at which a request was due to its image.
        occupancy: Rows that samples used, as a share of the rows of all calls until the last arrival.
        call_seconds: Mean wall time of a call with what the service does around it.
    """

    load: float | None
    offered: float | None
    requests: int
    throughput: float
    p50: float
    p95: float
    p99: float
    occupancy: float
    call_seconds: float

    def to_json(self) -> dict[str, Any]:
        """The figures by name."""
        return asdict(self)


async def play(service: Service, requests: Sequence[ImageRequest], times: Sequence[float], *, load: float | None = None) -> Loaded:
    """Send requests at their times, whatever the service does meanwhile, and wait for all answers.

    Args:
        service: The service, idle.
        requests: The requests.
        times: Seconds after the start at which each is due.
        load: For the figures.
    """
    before, start = await service.stats(), time.perf_counter()
    latencies: list[float] = []

    async def one(request: ImageRequest, due: float) -> None:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        async for event in service.submit(request):
            if isinstance(event, Finished):
                latencies.append(time.perf_counter() - start - due)

    async def counted() -> Stats:
        await asyncio.sleep(max(0.0, start + times[-1] - time.perf_counter()))
        return await service.stats()

    counters = asyncio.create_task(counted())
    await asyncio.gather(*(one(request, due) for request, due in zip(requests, times, strict=True)))
    seconds = time.perf_counter() - start
    assert len(latencies) == len(requests), "a service answered without an image"
    after = await counters
    if after.calls == before.calls:  # all were due at once
        after = await service.stats()
    return Loaded(
        load=load,
        offered=len(times) / times[-1] if times[-1] else None,
        requests=len(requests),
        throughput=len(requests) / seconds,
        p50=quantile(latencies, 0.5),
        p95=quantile(latencies, 0.95),
        p99=quantile(latencies, 0.99),
        occupancy=(after.rows - before.rows) / ((after.calls - before.calls) * after.slots),
        call_seconds=(after.step_seconds.total - before.step_seconds.total) / (after.calls - before.calls),
    )


async def capacity(service: Service, requests: Sequence[ImageRequest]) -> float:
    """Requests a second that a service computes while more of them wait than it can begin.

    Rows that were computed until the last request was begun, divided by the time and by the mean rows of a request: so requests that are half done at that
    moment count as half.
    """
    before, start = await service.stats(), time.perf_counter()
    tasks = [asyncio.create_task(_finished(service, request)) for request in requests]
    await asyncio.sleep(POLL)
    now = await service.stats()
    while now.waiting:
        await asyncio.sleep(POLL)
        now = await service.stats()
    rows, seconds = now.rows - before.rows, time.perf_counter() - start
    await asyncio.gather(*tasks)
    total = (await service.stats()).rows - before.rows
    return rows / seconds / (total / len(requests))


async def _finished(service: Service, request: ImageRequest) -> None:
    async for _ in service.submit(request):
        pass
