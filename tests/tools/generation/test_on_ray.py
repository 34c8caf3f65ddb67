"""Workers on a Ray cluster of this machine: two CPUs, a worker with one thread on each. Its start takes seconds, so one serves all tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from edm_deploy.errors import EdmDeployError
from edm_deploy_tools.generation.generate import generate_images
from edm_deploy_tools.generation.plan import plan_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.shards import shard_files

pytestmark = pytest.mark.extended

ROOT = Path(__file__).parents[3]
WORKER = "MapWorker(MapBatches(ShardWorker))"


@pytest.fixture(scope="module")
def ray_cluster():
    from edm_deploy_tools.common.ray_cluster import cluster

    with cluster("local", cpus=2) as ray:
        yield ray


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    out = tmp_path_factory.mktemp("generated") / "whole"
    generate_images(plan(chain), out)
    return files(out)


def plan(chain):
    return plan_of(chain.engine, GenerationRequest(num_images=24, steps=2), batch=2, shard_images=2)


def files(directory):
    return {path.name: path.read_bytes() for path in shard_files(directory).values()}


def worker_pids():
    return [process.pid for process in psutil.Process().children(recursive=True) if WORKER in " ".join(process.cmdline())]


def test_two_workers_give_the_images_of_one(chain, whole, ray_cluster, tmp_path):
    seen = []
    result = generate_images(plan(chain), tmp_path / "out", workers=2, progress=seen.append)
    assert files(tmp_path / "out") == whole
    assert len(result.workers) == 2
    assert os.getpid() not in result.workers
    assert [each.step for each in seen] == list(range(2, 25, 2))


def test_a_killed_worker_is_replaced_and_no_image_is_lost_or_doubled(chain, whole, ray_cluster, tmp_path):
    killed = []

    def kill_one(progress):
        if progress.step >= 4 and not killed:
            killed.append(worker_pids()[0])
            os.kill(killed[0], signal.SIGKILL)

    result = generate_images(plan(chain), tmp_path / "out", workers=2, progress=kill_one)
    assert killed
    assert result.made == 24
    assert files(tmp_path / "out") == whole
    assert set(result.workers) - set(killed)


def test_a_worker_with_other_versions_is_refused_in_one_line(chain, ray_cluster, tmp_path, monkeypatch):
    monkeypatch.setattr("edm_deploy_tools.generation.on_ray.versions", lambda: {"torch": "1.0"})
    with pytest.raises(EdmDeployError, match=r"has torch 2\S+, this process 1\.0\. Install the same versions on every machine") as refused:
        generate_images(plan(chain), tmp_path / "out", workers=1, ray="local")
    assert "\n" not in str(refused.value)
    assert shard_files(tmp_path / "out") == {}


def test_a_killed_driver_is_continued_and_its_cluster_ends_with_it(chain, whole, tmp_path):
    out = tmp_path / "out"
    options = ["--num-images", "24", "--steps", "2", "--batch", "2", "--shard-images", "2", "--workers", "2"]
    command = [sys.executable, "-m", "edm_deploy_tools.cli", "generate", str(chain.engine), "--out", str(out), *options]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.is_dir() and len(shard_files(out)) >= 2):
        time.sleep(0.002)
    workers = [other for other in psutil.Process(process.pid).children(recursive=True) if WORKER in " ".join(other.cmdline())]
    assert workers
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert alive == []
    assert generate_images(plan(chain), out).made < 24
    assert files(out) == whole
