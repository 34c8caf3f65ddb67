"""The application on Ray Serve, on a cluster of this machine: two replicas with one CPU each. Its start takes a minute, so one serves all tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from edm_deploy.errors import InputError
from edm_deploy.storage.directories import sha256_of

pytest.importorskip("ray")

REPLICA = "ServeReplica:edm-deploy:engines"


def test_replicas_are_a_number_or_a_range():
    from edm_deploy_tools.serving.ray_app import Replicas

    assert Replicas.parse("2") == Replicas(2, 2)
    assert Replicas.parse("1:4") == Replicas(1, 4)
    for wrong in ("0", "3:2", "many", "-1", "1:"):
        with pytest.raises(InputError, match=f"--replicas {wrong}: expected N or MIN:MAX"):
            Replicas.parse(wrong)


def served(engines, **options):
    from edm_deploy_tools.serving.ray_engines import ServedEngines

    digests = {name: sha256_of(directory / "manifest.json") for name, directory in engines.items()}
    return ServedEngines(engines=engines, digests=digests, slots=4, drain=20, **options)


def replica_pids():
    return [process.pid for process in psutil.Process().children(recursive=True) if REPLICA in " ".join(process.cmdline())]


def post(port, path="/v1/images/generations", **fields):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=200)
    connection.request("POST", path, json.dumps(fields), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.read()


def image(port, seed, **fields):
    status, body = post(port, seed=seed, **{"steps": 4, **fields})
    assert status == 200, body
    return json.loads(body)["data"][0]["b64_json"]


@pytest.fixture(scope="module")
def port(chain):
    from edm_deploy_tools.serving.ray_app import Replicas, deployed
    from edm_deploy_tools.serving.server import bound_socket

    with bound_socket("127.0.0.1", 0) as free:
        number = free.getsockname()[1]
    with deployed(served({"tiny": chain.engine}), Replicas(2, 2), address="local", host="127.0.0.1", port=number, slots=4):
        yield number


@pytest.mark.extended
def test_images_are_those_of_the_embedded_server(port, client):
    assert [image(port, seed) for seed in (1, 2)] == [client.generate(seed=seed, steps=4).json["data"][0]["b64_json"] for seed in (1, 2)]


@pytest.mark.extended
def test_a_stream_has_the_steps_and_errors_have_their_status(port):
    status, body = post(port, seed=1, steps=4, stream=True, progress=True)
    names = [block.split(b"\n")[0] for block in body.strip().split(b"\n\n")]
    assert (status, names.count(b"event: image_generation.progress"), names[-1]) == (200, 4, b"event: image_generation.completed")
    assert post(port, steps=100_000)[0] == 400
    assert post(port, steps=2, scheduler="magic")[0] == 400
    assert post(port, model="other")[0] == 404


@pytest.mark.extended
def test_what_a_killed_replica_had_accepted_is_computed_by_another(port):
    expected = [image(port, seed, steps=60) for seed in range(12)]
    pids = replica_pids()
    assert len(pids) == 2
    with ThreadPoolExecutor(12) as pool:
        found = [pool.submit(image, port, seed, steps=60) for seed in range(12)]
        time.sleep(0.2)
        os.kill(pids[0], signal.SIGKILL)
        assert [each.result() for each in found] == expected
    deadline = time.monotonic() + 120
    while len(set(replica_pids()) - {pids[0]}) < 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert len(set(replica_pids()) - {pids[0]}) == 2  # Ray Serve has restarted it


@pytest.mark.extended
def test_an_update_to_another_engine_loses_no_request(port, chain, tmp_path_factory, run):
    from ray import serve

    from edm_deploy_tools.serving.ray_app import APPLICATION, Replicas, application

    other = tmp_path_factory.mktemp("update") / "engine"
    ran = run("build-engine", chain.onnx, "--out", other, "--backend", "ort", "--batch", "1:4:4")
    assert ran.code == 0, ran.err
    before = image(port, 3)
    old = replica_pids()
    with ThreadPoolExecutor(2) as pool:
        update = pool.submit(serve.run, application(served({"tiny": other}), Replicas(2, 2), 4), name=APPLICATION, route_prefix="/")
        during = []
        while not update.done():
            during.append(image(port, 3))
        update.result()
    assert set(during) <= {before}  # the engines differ in their profile alone
    assert not set(replica_pids()) & set(old)


@pytest.mark.extended
def test_engines_that_a_replica_does_not_hold_make_room_for_each_other(chain, port):
    from ray import serve

    from edm_deploy_tools.serving.ray_app import APPLICATION, Replicas, application

    two = {"one": chain.engine, "two": chain.engine}
    serve.run(application(served(two, together=1), Replicas(1, 1), 4), name=APPLICATION, route_prefix="/")
    images = [image(port, 5, model=name) for name in ("one", "two", "one")]
    assert len(set(images)) == 1


@pytest.mark.extended
def test_an_engine_that_differs_between_machines_is_one_line(chain, port, copy_of):
    from edm_deploy.errors import ArtifactError
    from edm_deploy_tools.serving.ray_app import Replicas, deployed

    engine = copy_of(chain.engine)
    wanted = served({"tiny": engine})
    (engine / "manifest.json").write_text((engine / "manifest.json").read_text() + "\n")
    refused = pytest.raises(ArtifactError, match="is another engine than the one that was deployed")
    with refused, deployed(wanted, Replicas(1, 1), address="auto", host="127.0.0.1", port=port, slots=4):
        pass
