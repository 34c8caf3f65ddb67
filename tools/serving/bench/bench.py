"""In-flight batching against whole requests: capacity, latencies at shares of it, and the server's overhead, by one engine in one process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from edm_deploy.errors import InputError
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from edm_deploy_tools.common.child_process import tied
from edm_deploy_tools.common.console import Notify, silent
from edm_deploy_tools.common.machine import measurement_conditions
from edm_deploy_tools.serving.app import AppSettings
from edm_deploy_tools.serving.bench.measure import Loaded, Service, capacity, play
from edm_deploy_tools.serving.bench.whole_requests import WholeRequests
from edm_deploy_tools.serving.bench.workload import mixed_requests, poisson_arrivals
from edm_deploy_tools.serving.gate import RequestLog
from edm_deploy_tools.serving.server import HttpServer, bound_socket

IN_FLIGHT = "in-flight"
UNPADDED = "in-flight, --no-pad"
CLIENT = "edm_deploy_tools.serving.bench.client"
UNLIMITED = Limits(queue=1_000_000, memory=1 << 50)
BARE_SECONDS = 2.0  # of the bare loop, before and after each measurement of the server


@dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """Settings of the benchmark.

    Attributes:
        slots: Rows of each call; None as `ServedModel`.
        threads: CPU threads of the engine; None keeps the number that it was built with.
        requests: Requests of each measurement.
        loads: Shares of the capacity of in-flight batching.
        steps: Fewest and most steps of a request.
        rounds: How often each load is measured; the services take turns within each.
        overhead_seconds: Duration of each measurement of the server's overhead; 0 leaves it out.
        seed: Of requests and arrivals.
    """

    slots: int | None = None
    threads: int | None = None
    requests: int = 100
    loads: tuple[float, ...] = (0.5, 0.8, 0.95)
    steps: tuple[int, int] = (10, 50)
    rounds: int = 1
    overhead_seconds: float = 20.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.requests < 2 or self.rounds < 1 or not all(0 < load <= 2 for load in self.loads):
            raise InputError("bench-serve needs 2 requests or more, 1 round or more, and loads above 0, at most 2.")
        if not 1 <= self.steps[0] <= self.steps[1]:
            raise InputError(f"--steps {self.steps[0]}:{self.steps[1]}: expected 1 <= FEWEST <= MOST.")


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Figures of `bench_serving`.

    Attributes:
        slots: Rows of each call.
        capacities: Requests a second of each service, saturated.
        loaded: Figures of each service at each load, one for each round.
        overhead: Seconds of a call: `bare` engine, `loop` (in-flight, without HTTP) and `server` (with HTTP), each at full slots; empty if not measured.
        conditions: Date, machine, versions and settings.
    """

    slots: int
    capacities: dict[str, float]
    loaded: dict[str, list[Loaded]]
    overhead: dict[str, float]
    conditions: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All figures."""
        loaded = {name: [each.to_json() for each in figures] for name, figures in self.loaded.items()}
        return {
            "conditions": self.conditions,
            "slots": self.slots,
            "capacities": self.capacities,
            "loaded": loaded,
            "overhead": self.overhead,
        }


def bench_serving(engine: Path, settings: BenchSettings | None = None, *, notify: Notify = silent) -> BenchResult:
    """Measure an engine.

    Args:
        engine: Engine directory.
        settings: Loads, number of requests.
        notify: Called with a line of text before each measurement.

    Raises:
        InputError, ArtifactError, UnsupportedError: As `ServedModel`.
    """
    settings = settings or BenchSettings()
    with contextlib.ExitStack() as stack:
        model = ServedModel(engine, name="model", slots=settings.slots, threads=settings.threads)
        replica = Replica(model, UNLIMITED)
        stack.callback(replica.close)
        unpadded = Replica(model, UNLIMITED, pad=False)
        stack.callback(unpadded.close)
        services: dict[str, Service] = {IN_FLIGHT: replica, UNPADDED: unpadded}
        for name, most, shrinks in (
            ("static batch", model.slots, False),
            ("static batch, shrinking calls", model.slots, True),
            ("one at a time", 1, True),
        ):
            whole = WholeRequests(model, most, shrinks=shrinks)
            stack.callback(whole.close)
            services[name] = whole
        measured = asyncio.run(_measured(model, services, settings, notify))
        overhead = _overhead(model, replica, settings, notify) if settings.overhead_seconds else {}
    conditions = {**measurement_conditions(), "engine": str(engine), "backend": model.card.backend, "scheme": model.card.scheme}
    words = {"threads": settings.threads, "requests": settings.requests, "rounds": settings.rounds, "steps": list(settings.steps)}
    return replace(measured, overhead=overhead, conditions=conditions | words | {"seed": settings.seed})


async def _measured(model: ServedModel, services: dict[str, Service], settings: BenchSettings, notify: Notify) -> BenchResult:
    saturating = mixed_requests(model.card, max(settings.requests, 4 * model.slots), settings.seed, steps=settings.steps)
    model.warm_up(pad=False)  # each number of rows is compiled at its first call
    for name, service in services.items():
        notify(f"{name}: first calls")
        await play(service, _named(saturating[: model.slots], "warm"), [0.0] * model.slots)
    capacities = {}
    for name, service in services.items():
        notify(f"{name}: capacity")
        capacities[name] = await capacity(service, _named(saturating, "saturate"))
    loaded: dict[str, list[Loaded]] = {name: [] for name in services}
    for load in settings.loads:
        for round_ in range(settings.rounds):
            seed = settings.seed + 1 + round_
            requests = mixed_requests(model.card, settings.requests, seed, steps=settings.steps)
            work = _mean_steps(requests) / _mean_steps(saturating)  # of a request, in those of the capacity's
            times = poisson_arrivals(settings.requests, load * capacities[IN_FLIGHT] / work, seed)
            for name, service in services.items():
                notify(f"{name}: {load:.0%} load, round {round_ + 1} of {settings.rounds}")
                loaded[name].append(await play(service, _named(requests, f"{load}"), times, load=load))
    return BenchResult(slots=model.slots, capacities=capacities, loaded=loaded, overhead={})


def _mean_steps(requests: Sequence[Any]) -> float:
    return sum(request.steps for request in requests) / len(requests)


def _named(requests: Sequence[Any], prefix: str) -> list[Any]:
    return [replace(request, id=f"{prefix}-{request.id}") for request in requests]


def _overhead(model: ServedModel, replica: Replica, settings: BenchSettings, notify: Notify) -> dict[str, float]:
    """Seconds of a call at full slots: of the engine alone, of the loop, and of the server with clients in another process; medians over three turns."""
    found: dict[str, list[float]] = {"bare": [], "loop": [], "server": []}
    for turn in range(3):
        notify(f"overhead, turn {turn + 1} of 3")
        before = bare_seconds(model)
        loop = asyncio.run(_full_calls(replica, model, settings, turn))
        server = _served_calls(replica, settings, turn)
        found["bare"].append((before + bare_seconds(model)) / 2)
        found["loop"].append(loop)
        found["server"].append(server)
    return {name: median(values) for name, values in found.items()}


@torch.no_grad()
def bare_seconds(model: ServedModel, seconds: float = BARE_SECONDS) -> float:
    """Mean time of a call of the engine with all rows in use, called again and again with random inputs."""
    generator = torch.Generator().manual_seed(0)
    (request,) = mixed_requests(model.card, 1, 0)
    prepared = model.prepare(request)
    rows = [row for sample in [model.start(request, prepared, 0)] for row in sample.inputs()]
    inputs = {name: torch.cat([value] * model.slots) for name, value in rows[0].items()}
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=generator).to(inputs["sample"])
    model.denoiser.run(inputs)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds or calls < 3:
        model.denoiser.run(inputs)
        calls += 1
    return passed / calls


async def _full_calls(replica: Replica, model: ServedModel, settings: BenchSettings, turn: int) -> float:
    """Wall time of a call of the loop while more requests wait than it can begin."""
    count = max(4 * model.slots, int(settings.overhead_seconds * 10))
    requests = _named(mixed_requests(model.card, count, settings.seed + turn, steps=settings.steps), f"loop{turn}")
    tasks = [asyncio.create_task(_drained(replica, request)) for request in requests]
    try:
        return await _seconds_of_a_call(replica, settings.overhead_seconds)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _drained(replica: Replica, request: Any) -> None:
    async for _ in replica.submit(request):
        pass


def _served_calls(replica: Replica, settings: BenchSettings, turn: int) -> float:
    """Wall time of a call of the loop behind the HTTP server, which clients of another process keep full."""
    with serving(replica) as port:
        arguments = [port, 3 * replica.model.slots, settings.overhead_seconds + 2, turn]
        command = tied([sys.executable, "-m", CLIENT, *map(str, arguments)])
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        seconds = asyncio.run(_seconds_of_a_call(replica, settings.overhead_seconds))
        answers, _ = child.communicate()
    assert set(json.loads(answers)) == {"200"}, f"the server answered {answers.strip()}"
    return seconds


async def _seconds_of_a_call(replica: Replica, seconds: float) -> float:
    """Wall time of a call, over a time in which every call is full."""
    slots = replica.model.slots
    for _ in range(10_000):
        if (await replica.stats()).occupied == slots:
            break
        await asyncio.sleep(0.01)
    before, start = await replica.stats(), time.perf_counter()
    now = before
    while time.perf_counter() - start < seconds and (now.requests >= slots or now.calls == before.calls):
        await asyncio.sleep(0.01)
        now = await replica.stats()
    passed = time.perf_counter() - start
    calls = now.calls - before.calls
    # Calls that were not full did less than the bare loop's; none is to be counted as cheaper.
    return passed / calls * (slots * calls) / max(now.rows - before.rows, 1)


@contextlib.contextmanager
def serving(replica: Replica) -> Iterator[int]:
    """The HTTP server of a replica in a thread; yields its port."""
    ready: queue.Queue[str] = queue.Queue()
    with bound_socket("127.0.0.1", 0) as bound:
        server = HttpServer({"model": _Undrained(replica)}, bound, AppSettings(log=RequestLog(None)), drain=600, started=ready.put)  # type: ignore[dict-item]
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        try:
            yield int(ready.get(timeout=60).rpartition(":")[2])
        finally:
            server.stop()
            thread.join()


class _Undrained:
    """A replica that serves on after its server has ended."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self.card, self.submit, self.cancel, self.stats = replica.card, replica.submit, replica.cancel, replica.stats

    async def drain(self, timeout: float) -> bool:
        """Wait for the accepted requests."""
        deadline = time.monotonic() + timeout
        while (await self.stats()).requests and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        return True
