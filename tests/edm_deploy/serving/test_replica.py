import asyncio
import shutil
from dataclasses import replace

import numpy as np
import pytest

from edm_deploy.errors import InputError
from edm_deploy.serving.interface import Accepted, BusyError, Finished, ImageRequest, Preview, Progress, UnavailableError
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica


async def events_of(replica, request):
    return [event async for event in replica.submit(request)]


def finished(events):
    return {event.image: event.pixels for event in events if isinstance(event, Finished)}


def test_requests_that_run_together_get_the_images_that_they_get_alone(model, replica_of):
    """Through the loop and its threads: several images, previews, other step counts and schedulers, and neighbours that are cancelled."""
    replica = replica_of(model)
    requests = [
        ImageRequest(id=str(seed), seed=10 * seed, count=1 + seed % 3, steps=2 + seed, scheduler=("ddim", "unipc")[seed % 2])
        for seed in range(6)
    ]

    async def main():
        alone = [finished(await events_of(replica, request)) for request in requests]

        async def given_up(number):
            async for event in replica.submit(ImageRequest(id=f"gone {number}", seed=99, steps=30, progress=True)):
                if isinstance(event, Progress) and event.step > number:
                    return

        neighbours = [given_up(number) for number in range(4)]
        together = await asyncio.gather(
            *(events_of(replica, replace(request, id=f"again {request.id}")) for request in requests), *neighbours
        )
        stats = await replica.stats()
        return alone, [finished(events) for events in together[: len(requests)]], stats

    alone, together, stats = asyncio.run(main())
    for request, expected, found in zip(requests, alone, together, strict=True):
        assert set(found) == set(range(request.count))
        assert all(np.array_equal(found[image], expected[image]) for image in expected), request.id
    assert stats.finished == 2 * len(requests)
    assert (stats.requests, stats.cancelled) == (0, 4)
    assert stats.rows > stats.calls, "no two samples shared a call"


def test_image_i_of_a_request_is_the_first_of_one_with_the_next_seed(model, replica_of):
    replica = replica_of(model)

    async def main():
        return await events_of(replica, ImageRequest(id="a", seed=5, count=2, steps=2)), await events_of(
            replica, ImageRequest(id="b", seed=6, steps=2)
        )

    several, one = asyncio.run(main())
    assert np.array_equal(finished(several)[1], finished(one)[0])
    assert {event.seed for event in several if isinstance(event, Finished)} == {5, 6}


def test_events_come_in_order(model, replica_of):
    replica = replica_of(model)
    events = asyncio.run(events_of(replica, ImageRequest(id="a", steps=6, previews=2, progress=True)))
    assert isinstance(events[0], Accepted) and isinstance(events[-1], Finished)
    assert [event.step for event in events if isinstance(event, Progress)] == [1, 2, 3, 4, 5, 6]
    numbers = [event.number for event in events if isinstance(event, Preview)]
    assert numbers == sorted(numbers) and set(numbers) <= {0, 1}


def test_limits_are_checked_before_a_request_is_accepted(model, replica_of):
    replica = replica_of(model, images=2, steps=20, prompt=5, previews=1, memory=5_000_000)
    refused = {
        "n is 3, expected at most 2": {"count": 3},
        "steps is 21, expected at most 20": {"steps": 21},
        "prompt length is 6, expected at most 5": {"prompt": "abcdef"},
        "previews is 2": {"previews": 2},
    }
    for message, fields in refused.items():
        with pytest.raises(InputError, match=message):
            asyncio.run(events_of(replica, ImageRequest(id="a", **fields)))
    small = replica_of(model, memory=1000)
    with pytest.raises(InputError, match="The request needs 0 MiB, expected at most 0"):
        asyncio.run(events_of(small, ImageRequest(id="a")))


def test_a_full_queue_is_busy_and_says_for_how_long(model, replica_of):
    replica = replica_of(model, queue=2)

    async def main():
        running = [replica.submit(ImageRequest(id=name, steps=100)) for name in "ab"]
        for events in running:
            assert isinstance(await anext(events), Accepted)
        with pytest.raises(BusyError, match="2 requests are in the queue, expected fewer than 2") as caught:
            await events_of(replica, ImageRequest(id="c"))
        assert caught.value.retry_after >= 1
        with pytest.raises(InputError, match="'a' has been accepted already"):
            await events_of(replica, ImageRequest(id="a"))
        await running[0].aclose()
        assert len(finished(await events_of(replica, ImageRequest(id="c", steps=1)))) == 1
        await running[1].aclose()

    asyncio.run(main())


def test_a_drained_replica_finishes_what_it_has_accepted_and_takes_no_more(model, replica_of):
    replica = replica_of(model)

    async def main():
        accepted = asyncio.create_task(events_of(replica, ImageRequest(id="a", steps=5)))
        await asyncio.sleep(0)
        drained = asyncio.create_task(replica.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="shutting down"):
            await events_of(replica, ImageRequest(id="b"))
        assert (await replica.stats()).state == "draining"
        return await drained, await accepted

    complete, events = asyncio.run(main())
    assert complete and len(finished(events)) == 1


def test_what_is_not_finished_in_time_is_answered(model, replica_of):
    replica = replica_of(model)

    async def main():
        accepted = asyncio.create_task(events_of(replica, ImageRequest(id="a", steps=150, count=10)))
        await asyncio.sleep(0.05)
        assert not await replica.drain(0)
        with pytest.raises(UnavailableError, match="could not finish this request"):
            await accepted

    asyncio.run(main())


def test_a_closed_replica_answers_what_it_has_accepted(engine):
    replica = Replica(ServedModel(engine, name="tiny", slots=4))

    async def main():
        accepted = asyncio.create_task(events_of(replica, ImageRequest(id="a", steps=150, count=10)))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(replica.close)
        with pytest.raises(UnavailableError, match="has been stopped"):
            await accepted
        with pytest.raises(UnavailableError, match="closed"):
            await events_of(replica, ImageRequest(id="b"))

    asyncio.run(main())


def test_an_engine_directory_that_changes_takes_no_more_requests(engine, tmp_path):
    directory = shutil.copytree(engine, tmp_path / "engine")
    replica = Replica(ServedModel(directory, name="tiny", slots=4), Limits())

    async def main():
        assert len(finished(await events_of(replica, ImageRequest(id="a", steps=1)))) == 1
        (directory / "manifest.json").write_text("{}")
        with pytest.raises(UnavailableError, match=r"have changed since the server opened them\. Restart the server"):
            await events_of(replica, ImageRequest(id="b", steps=1))
        (directory / "manifest.json").unlink()
        assert (await replica.stats()).state == "changed"

    asyncio.run(main())
    replica.close()
