import asyncio

import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.serving.interface import EngineError, Finished, ImageRequest, UnavailableError
from tests.edm_deploy.serving.test_replica import events_of


@pytest.fixture
def breaking(model, monkeypatch):
    """Makes calls of the engine fail, or return NaN."""

    def with_output(change):
        run = type(model.denoiser).run
        monkeypatch.setattr(type(model.denoiser), "run", lambda self, inputs: change(run(self, inputs)))

    return with_output


def failing(_):
    raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")


def test_an_engine_that_fails_once_costs_the_requests_of_that_call_alone(model, replica_of, breaking):
    replica = replica_of(model)
    outcomes = [failing, lambda output: output]
    breaking(lambda output: outcomes.pop(0)(output) if outcomes else output)
    with pytest.raises(EngineError, match="The engine failed: RuntimeError: CUDA error: an illegal memory access"):
        asyncio.run(events_of(replica, ImageRequest(id="a", steps=2)))
    events = asyncio.run(events_of(replica, ImageRequest(id="b", steps=2)))
    assert isinstance(events[-1], Finished)
    stats = asyncio.run(replica.stats())
    assert (stats.failed, stats.finished, stats.state) == (1, 1, "ready")


def test_an_engine_that_keeps_failing_is_given_up(model, replica_of, breaking):
    replica = replica_of(model)
    breaking(failing)

    async def main():
        for number in range(3):
            with pytest.raises((EngineError, UnavailableError), match="The engine failed"):
                await events_of(replica, ImageRequest(id=str(number), steps=2))
        while (await replica.stats()).state == "ready":
            await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError, match=r"failed 3 times in a row: CUDA error.*Restart the server"):
            await events_of(replica, ImageRequest(id="d", steps=2))
        assert (await replica.stats()).state == "failed"

    asyncio.run(main())


def test_a_prediction_of_nan_is_an_error_and_no_black_image(model, replica_of, breaking):
    replica = replica_of(model)
    breaking(lambda output: output * torch.nan)
    with pytest.raises(EngineError, match="holds NaN or infinity"):
        asyncio.run(events_of(replica, ImageRequest(id="a", steps=2)))


def test_a_fault_in_the_loop_answers_every_request(model, replica_of, monkeypatch):
    """Also those that wait: nothing is lost in silence."""
    replica = replica_of(model)
    monkeypatch.setattr(replica._loop, "_chosen", lambda: 1 / 0)

    async def main():
        results = await asyncio.gather(*(events_of(replica, ImageRequest(id=name)) for name in "abc"), return_exceptions=True)
        assert [type(result) for result in results] == [UnavailableError] * 3
        assert "The serving loop ended: ZeroDivisionError" in str(results[0])

    asyncio.run(main())


def test_an_encoder_or_decoder_that_fails_costs_its_request_alone(model, replica_of, monkeypatch):
    replica = replica_of(model)

    def broken(*_):
        raise MemoryError

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(model, "prepare", broken)
            with pytest.raises(EngineError, match="encoder failed: MemoryError"):
                await events_of(replica, ImageRequest(id="a", steps=1))
        with monkeypatch.context() as patch:
            patch.setattr(model, "pixels", broken)
            with pytest.raises(EngineError, match="The VAE failed: MemoryError"):
                await events_of(replica, ImageRequest(id="b", steps=1))
        with monkeypatch.context() as patch:
            patch.setattr(model, "start", lambda *_: (_ for _ in ()).throw(InputError("no")))
            with pytest.raises(InputError, match="no"):
                await events_of(replica, ImageRequest(id="c", steps=1))
        assert isinstance((await events_of(replica, ImageRequest(id="d", steps=1)))[-1], Finished)

    asyncio.run(main())


def test_the_engine_runs_on_while_a_prompt_is_encoded(model, replica_of, monkeypatch):
    """Text encoder and VAE run beside the loop: a request is finished while another's prompt is being encoded."""
    import threading

    replica = replica_of(model)
    release, prepare = threading.Event(), model.prepare

    def slow(request):
        if request.id == "slow":
            assert release.wait(30)
        return prepare(request)

    monkeypatch.setattr(model, "prepare", slow)

    async def main():
        first = replica.submit(ImageRequest(id="first", steps=50, progress=True))
        await anext(first)
        await anext(first)  # a step: its prompt has been encoded
        second = asyncio.create_task(events_of(replica, ImageRequest(id="slow", steps=1)))
        rest = [event async for event in first]
        assert rest[-2].step == 50 and isinstance(rest[-1], Finished)
        assert not second.done()
        release.set()
        await second

    asyncio.run(main())


@pytest.mark.parametrize(("pad", "allowed"), [(True, {4}), (False, {1, 2})])
def test_calls_have_all_slots_or_as_many_rows_as_wait(model, replica_of, breaking, pad, allowed):
    """Two images in 4 slots; one may be begun before the other, and ends before it."""
    seen = []
    breaking(lambda output: seen.append(len(output)) or output)
    replica = replica_of(model, pad=pad)

    async def main():
        requests = [ImageRequest(id=str(steps), seed=steps, steps=steps) for steps in (3, 12)]
        return await asyncio.gather(*(events_of(replica, request) for request in requests))

    results = asyncio.run(main())
    assert set(seen) <= allowed
    assert all(isinstance(events[-1], Finished) for events in results)


def test_a_warm_up_calls_every_number_of_rows_that_will_be_called(model, breaking):
    seen = []
    breaking(lambda output: seen.append(len(output)) or output)
    model.warm_up()
    model.warm_up(pad=False)
    assert seen == [4, 1, 2, 3, 4]
