from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edm_deploy.errors import ArtifactError, EdmDeployError, InputError
from edm_deploy_tools.generation.generate import generate_images
from edm_deploy_tools.generation.plan import plan_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.shards import read_set, shard_files

ROOT = Path(__file__).parents[3]


def plan(chain, count=10, **options):
    request = GenerationRequest(num_images=count, steps=2, **{name: options.pop(name) for name in ("seed", "scheduler") if name in options})
    return plan_of(chain.engine, request, **{"batch": 4, "shard_images": 4, **options})


def files(directory):
    return {path.name: path.read_bytes() for path in shard_files(directory).values()}


def pngs(directory):
    return [record.png for record in read_set(directory)]


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    """An uninterrupted run of ten images in three shards."""
    out = tmp_path_factory.mktemp("generated") / "whole"
    assert generate_images(plan(chain), out).made == 10
    return out


def test_images_are_distinct_and_an_image_depends_on_its_index_alone(chain, whole, tmp_path):
    assert len(set(pngs(whole))) == 10
    generate_images(
        plan(chain, 7, shard_images=3), tmp_path / "other"
    )  # other batches: every third image begins one, and the last is filled up
    assert pngs(tmp_path / "other") == pngs(whole)[:7]
    generate_images(plan(chain, 3, seed=1), tmp_path / "seed")
    assert not set(pngs(tmp_path / "seed")) & set(pngs(whole))


@pytest.mark.parametrize("scheduler", ["ddpm", "euler"])
def test_noise_that_a_scheduler_adds_is_the_images_own(chain, tmp_path, scheduler):
    for count in (4, 5):
        generate_images(plan(chain, count, scheduler=scheduler, shard_images=count), tmp_path / str(count))
    assert pngs(tmp_path / "5")[:4] == pngs(tmp_path / "4")


def test_the_description_lists_every_shard_with_its_hash(chain, whole):
    content = json.loads((whole / "images.json").read_text())
    assert content["complete"]
    assert list(content["shards"]) == [path.name for path in shard_files(whole).values()]
    assert content["settings_digest"] == plan(chain).settings_digest
    record = next(read_set(whole))
    assert (record.index, record.seed, record.settings, record.engine) == (0, 0, content["settings_digest"], plan(chain).engine_digest)


def test_a_run_continues_with_the_missing_and_damaged_shards(chain, whole, tmp_path, caplog):
    out = tmp_path / "out"
    generate_images(plan(chain), out)
    first, second, third = shard_files(out).values()
    first.unlink()
    second.write_bytes(second.read_bytes()[:700])
    (out / f".{first.name}.0123abcd.part").write_bytes(b"torn")
    untouched = third.stat().st_mtime_ns
    result = generate_images(plan(chain), out)
    assert (result.made, result.count) == (8, 10)
    assert third.stat().st_mtime_ns == untouched
    assert files(out) == files(whole)
    assert sorted(path.name for path in out.iterdir()) == [*files(whole), "images.json"]
    assert generate_images(plan(chain), out).made == 0


def test_a_set_grows_and_its_images_stay(chain, whole, tmp_path):
    out = tmp_path / "out"
    generate_images(plan(chain, 6), out)
    assert generate_images(plan(chain), out).made == 6  # the last shard of six was a half
    assert files(out) == files(whole)
    with pytest.raises(InputError, match="holds a set of 10 images, 6 are requested"):
        generate_images(plan(chain, 6), out)


def test_a_set_of_other_settings_is_refused_and_replaced_only_by_overwrite(chain, tmp_path):
    out = tmp_path / "out"
    generate_images(plan(chain, 2), out)
    with pytest.raises(InputError, match=r"holds images of other settings: seed 0 there, 5 here\. Give the same options"):
        generate_images(plan(chain, 2, seed=5), out)
    assert generate_images(plan(chain, 2, seed=5), out, overwrite=True).made == 2
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="holds other files"):
        generate_images(plan(chain, 2), tmp_path / "mine", overwrite=True)


def test_two_runs_do_not_write_one_folder(chain, tmp_path):
    def meanwhile(progress):
        with pytest.raises(ArtifactError, match="is being written by another run"):
            generate_images(plan(chain, 4), tmp_path / "out")

    generate_images(plan(chain, 4), tmp_path / "out", progress=meanwhile)


def test_a_full_disk_is_one_line_and_the_complete_shards_stay(chain, whole, tmp_path, monkeypatch):
    from edm_deploy_tools.generation import worker

    written = []

    def fills_up(path, *rest):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        write(path, *rest)

    write = worker.write_shard
    with monkeypatch.context() as patch:
        patch.setattr(worker, "write_shard", fills_up)
        with pytest.raises(EdmDeployError, match=r"cannot be written: No space left on device\. Free space, and run the command again"):
            generate_images(plan(chain), tmp_path / "out")
    assert len(shard_files(tmp_path / "out")) == 1
    assert generate_images(plan(chain), tmp_path / "out").made == 6
    assert files(tmp_path / "out") == files(whole)


def test_an_engine_that_changes_under_the_run_ends_it(chain, copy_of, tmp_path):
    engine = copy_of(chain.engine)
    made = plan_of(engine, GenerationRequest(num_images=2, steps=1))
    (engine / "manifest.json").write_text((engine / "manifest.json").read_text() + "\n")
    with pytest.raises(EdmDeployError, match="is another engine than at the start"):
        generate_images(made, tmp_path / "out")


def test_a_killed_run_is_continued_without_a_lost_or_doubled_image(chain, whole, tmp_path):
    out = tmp_path / "out"
    options = ["--num-images", "10", "--steps", "2", "--batch", "4", "--shard-images", "4"]
    command = [sys.executable, "-m", "edm_deploy_tools.cli", "generate", str(chain.engine), "--out", str(out), *options]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (out.is_dir() and shard_files(out)):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not json.loads((out / "images.json").read_text())["complete"] or process.returncode == 0
    assert generate_images(plan(chain), out).made <= 6
    assert files(out) == files(whole)


def test_no_worker_is_refused(chain, tmp_path):
    with pytest.raises(InputError, match="--workers 0: expected 1 or more"):
        generate_images(plan(chain), tmp_path / "out", workers=0)
