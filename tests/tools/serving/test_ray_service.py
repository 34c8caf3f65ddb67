from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("ray")

from ray.exceptions import ActorDiedError

from edm_deploy.errors import InputError
from edm_deploy.serving.histogram import Counts
from edm_deploy.serving.interface import Accepted, Finished, ImageRequest, Progress, Stats, UnavailableError
from edm_deploy_tools.serving.ray_engines import Failure
from edm_deploy_tools.serving.ray_service import ATTEMPTS, RayService, added

PIXELS = np.zeros((1, 1, 3), np.uint8)


class Stream:
    """The answers of one replica: events, then its death if it dies."""

    def __init__(self, events, dies):
        self.events, self.dies, self.cancelled = events, dies, False

    async def __aiter__(self):
        for event in self.events:
            yield event
        if self.dies:
            raise ActorDiedError

    def cancel(self):
        self.cancelled = True


class Handle:
    """Ray's handle, in front of replicas that answer in turn as given; what Ray itself does is tested in test_ray_app.py."""

    def __init__(self, *streams):
        self.streams, self.requests = list(streams), []
        self.submit = self

    def options(self, **_):
        return self

    def remote(self, request):
        self.requests.append(request)
        return self.streams[len(self.requests) - 1]


def finished(*images):
    return [Accepted(ahead=0, memory=1), *(Finished(image=image, seed=image, pixels=PIXELS) for image in images)]


def collect(service, request):
    async def events():
        return [event async for event in service.submit(request)]

    return asyncio.run(events())


def test_a_request_goes_to_another_replica_where_its_own_dies_and_no_image_comes_twice():
    handle = Handle(
        Stream(finished(1), dies=True), Stream([*finished(1), Progress(image=0, step=1, steps=2), *finished(0)[1:]], dies=False)
    )
    events = collect(RayService("tiny", handle), ImageRequest(id="a", count=2))
    assert [type(event).__name__ for event in events] == ["Accepted", "Finished", "Progress", "Finished"]
    assert [event.image for event in events[1:]] == [1, 0, 0]
    assert [request.id for request in handle.requests] == ["a", "a-1"]  # an id is that of one request in a replica


def test_a_request_that_every_replica_dies_of_is_answered():
    handle = Handle(*[Stream(finished(), dies=True) for _ in range(ATTEMPTS)])
    with pytest.raises(UnavailableError, match=r"5 replicas died while they computed this request\. Send it again later"):
        collect(RayService("tiny", handle), ImageRequest(id="a"))


def test_an_error_of_a_request_is_that_of_the_replica_and_not_tried_again():
    handle = Handle(Stream([Failure(InputError("steps is 0."))], dies=False))
    with pytest.raises(InputError, match="steps is 0"):
        collect(RayService("tiny", handle), ImageRequest(id="a"))
    assert len(handle.requests) == 1


def test_closing_the_events_cancels_the_request_in_its_replica():
    stream = Stream([*finished(0), *finished(1)], dies=False)

    async def first():
        events = RayService("tiny", Handle(stream)).submit(ImageRequest(id="a", count=2))
        await anext(events)
        await events.aclose()

    asyncio.run(first())
    assert stream.cancelled


def test_a_draining_service_takes_no_request():
    service = RayService("tiny", Handle())
    assert asyncio.run(service.drain(1))
    with pytest.raises(UnavailableError, match="shutting down"):
        collect(service, ImageRequest(id="a"))


def test_statistics_of_replicas_are_added_and_one_that_is_ready_is_enough():
    one = Stats(state="failed", reason="broken", slots=4, calls=3, step_seconds=Counts(total=1.5))
    both = added([one, Stats(slots=4, calls=2, step_seconds=Counts(total=0.5))])
    assert (both.state, both.reason, both.slots, both.calls, both.step_seconds.total) == ("ready", "", 8, 5, 2.0)
    assert (added([one]).state, added([]).state) == ("failed", "failed")
