from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from edm_deploy.serving.interface import Accepted, Finished, Stats
from edm_deploy_tools.serving.bench.measure import capacity, play
from edm_deploy_tools.serving.bench.workload import mixed_requests


class OneServer:
    """Answers one request at a time, each after the same time: its capacity and latencies are known."""

    def __init__(self, seconds):
        self.seconds, self.lock, self.counts = seconds, asyncio.Lock(), Stats(slots=2)

    async def submit(self, request):
        self.counts = replace(self.counts, requests=self.counts.requests + 1, waiting=self.counts.waiting + 1)
        yield Accepted(ahead=0, memory=0)
        async with self.lock:
            self.counts = replace(self.counts, waiting=self.counts.waiting - 1)
            await asyncio.sleep(self.seconds)
            self.counts = replace(self.counts, calls=self.counts.calls + 1, rows=self.counts.rows + 1)
        yield Finished(image=0, seed=0, pixels=None)

    async def stats(self):
        return self.counts


def test_latency_counts_from_the_time_at_which_a_request_was_due(replica):
    requests = mixed_requests(asyncio.run(replica.card()), 3, 0)

    async def measured():
        return await play(OneServer(0.05), requests, [0.0, 0.0, 0.01], load=0.5)

    start = time.perf_counter()
    found = asyncio.run(measured())
    passed = time.perf_counter() - start
    assert found.p50 >= 0.1  # the second one waits for the first
    assert 0.14 <= found.p99 <= passed
    assert 3 / passed <= found.throughput <= 20
    assert found.occupancy == 0.5  # one row of two
    assert found.offered == 300.0


def test_capacity_counts_the_rows_until_the_last_request_is_begun(replica):
    requests = mixed_requests(asyncio.run(replica.card()), 6, 0)

    async def measured():
        return await capacity(OneServer(0.05), requests)

    assert 0 < asyncio.run(measured()) <= 20.5  # 1 / 0.05 on an idle machine
