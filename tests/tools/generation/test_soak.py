from __future__ import annotations

import shutil

import pytest

from edm_deploy_tools.generation import soak as soak_generate
from edm_deploy_tools.generation.generate import generate_images
from edm_deploy_tools.generation.plan import plan_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.shards import read_shard, shard_files, write_shard


def test_an_image_that_is_lost_doubled_or_changed_is_found(chain, tmp_path):
    whole, other = tmp_path / "whole", tmp_path / "other"
    generate_images(plan_of(chain.engine, GenerationRequest(num_images=4, steps=1), shard_images=2), whole)
    shutil.copytree(whole, other)
    soak_generate.compare(whole, other, same := soak_generate.Figures())
    assert (same.images, same.distinct, same.different) == (4, 4, 0)
    path = list(shard_files(other).values())[1]
    records = list(read_shard(path))
    write_shard(path, [records[0], records[0]], "webdataset")
    soak_generate.compare(whole, other, doubled := soak_generate.Figures())
    assert (doubled.images, doubled.distinct) == (4, 3)
    assert doubled.different
    path.unlink()
    soak_generate.compare(whole, other, lost := soak_generate.Figures())
    assert (lost.images, lost.different) == (2, 3)


@pytest.mark.extended
@pytest.mark.parametrize("workers", [1, 2])
def test_a_set_whose_making_was_killed_is_that_of_an_uninterrupted_run(chain, tmp_path, workers, capfd):
    options = ["--images", "60", "--kills", "3", "--workers", str(workers), "--steps", "2", "--shard-images", "4"]
    assert soak_generate.main([str(chain.engine), "--out", str(tmp_path / "out"), *options]) == 0
    assert "killed_drivers" in capfd.readouterr().out


def test_a_directory_that_is_not_empty_is_refused(tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("mine")
    assert soak_generate.main(["engine", "--out", str(tmp_path)]) == 2
    assert "is not empty. Choose a new directory" in capfd.readouterr().err
