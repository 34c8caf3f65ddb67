from __future__ import annotations

import asyncio

import numpy as np
import pytest

from edm_deploy.serving.interface import Finished, ImageRequest
from edm_deploy_tools.serving.bench.whole_requests import WholeRequests


def images(service, requests):
    async def one(request):
        return [event async for event in service.submit(request)][-1]

    async def together():
        return await asyncio.gather(*(one(request) for request in requests))

    return asyncio.run(together())


REQUESTS = [ImageRequest(id=str(number), seed=number, steps=steps) for number, steps in enumerate((2, 5, 3))]


def test_a_batch_of_whole_requests_has_the_images_of_the_loop_and_rows_leave_early(replica):
    expected = images(replica, REQUESTS)
    service = WholeRequests(replica.model, 4, shrinks=False)
    found = images(service, REQUESTS)
    stats = asyncio.run(service.stats())
    service.close()
    assert all(isinstance(event, Finished) for event in found)
    assert all(np.array_equal(one.pixels, other.pixels) for one, other in zip(found, expected, strict=True))
    assert stats.rows == 2 + 5 + 3
    assert 5 <= stats.calls <= 8  # 5 if all three were waiting; the first may have been begun alone


def test_one_at_a_time_calls_the_engine_with_its_rows_alone(replica, monkeypatch):
    sizes = []
    predict = replica.model.predict
    monkeypatch.setattr(
        replica.model, "predict", lambda samples, pad=True: sizes.append(len(samples) if not pad else None) or predict(samples, pad=pad)
    )
    service = WholeRequests(replica.model, 1, shrinks=True)
    images(service, REQUESTS)
    service.close()
    assert sizes == [1] * 10


def test_an_engine_that_fails_ends_the_requests(replica, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(replica.model, "predict", fail)
    service = WholeRequests(replica.model, 1, shrinks=True)
    with pytest.raises(RuntimeError, match="broken"):
        images(service, REQUESTS[:1])
    service.close()
