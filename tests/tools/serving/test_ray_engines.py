from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

pytest.importorskip("ray")

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.serving.interface import ImageRequest, UnavailableError
from edm_deploy.storage.directories import sha256_of
from edm_deploy_tools.serving.ray_engines import EngineReplica, Failure, ServedEngines


def served(engine, **options):
    return ServedEngines(engines={"tiny": engine}, digests={"tiny": sha256_of(engine / "manifest.json")}, slots=2, **options)


def test_a_machine_with_other_packages_or_engines_is_refused(chain, copy_of, tmp_path):
    served(chain.engine).check()
    with pytest.raises(UnsupportedError, match=r"The worker on \S+ has torch 2\S+, this process 1\.0"):
        served(chain.engine, versions={"torch": "1.0"}).check()
    engine = copy_of(chain.engine)
    wanted = served(engine)
    (engine / "manifest.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"is another engine than the one that was deployed\. Deploy again"):
        wanted.check()
    with pytest.raises(ArtifactError, match="is no engine on"):
        replace(wanted, engines={"tiny": tmp_path / "nowhere"}).check()


def test_an_engine_that_makes_room_for_another_ends_its_requests_first(chain):
    async def evicted():
        engine = await EngineReplica(served(chain.engine, drain=0.0)).open("tiny")
        events = engine.replica.submit(ImageRequest(id="a", steps=140))
        await anext(events)
        await asyncio.to_thread(engine.__del__)
        with pytest.raises(UnavailableError, match="could not finish this request"):
            await anext(events)
        engine.__del__()  # again, by the garbage collector

    asyncio.run(evicted())


def test_a_failure_can_be_sent_between_processes(chain):
    import pickle

    failure = pickle.loads(pickle.dumps(Failure(UnavailableError("gone"))))
    assert isinstance(failure.error, UnavailableError)
    assert str(failure.error) == "gone"
    with pytest.raises(UnsupportedError, match="There is no model 'other', expected one of tiny"):
        asyncio.run(EngineReplica(served(chain.engine)).open("other"))
