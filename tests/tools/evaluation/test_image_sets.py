from __future__ import annotations

import json

import pytest

from edm_deploy_tools.generation.generate import generate_images
from edm_deploy_tools.generation.plan import plan_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest


@pytest.fixture(scope="module")
def sets(chain, tmp_path_factory):
    """Two sets of six images from different seeds, one of them as Parquet."""
    root = tmp_path_factory.mktemp("sets")
    for name, shard_format, seed in (("one", "webdataset", 0), ("two", "parquet", 1)):
        request = GenerationRequest(num_images=6, steps=1, seed=seed)
        generate_images(plan_of(chain.engine, request, shard_images=4, shard_format=shard_format), root / name)
    return root


def test_sets_are_compared_with_a_set_without_sampling(run, sets, tmp_path):
    ran = run(
        "evaluate", sets / "one", sets / "two", "--metrics", "fid,precision", "--images", sets / "one", "--out", tmp_path / "out", "--json"
    )
    assert ran.code == 0, ran.err
    one, two = json.loads(ran.out)["sets"]
    assert (one["images"], two["images"]) == (6, 6)
    assert one["Frechet distance, features-cifar10"] == pytest.approx(0, abs=1e-3)
    assert two["Frechet distance, features-cifar10"] > 0.01
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["sets"] == [one, two]
    assert "one" in run("evaluate", sets / "one", "--metrics", "fid", "--images", sets / "two", "--out", tmp_path / "table").out


def test_an_engine_is_compared_with_a_set(run, sets, chain, tmp_path):
    options = ("--samples", 2, "--steps", 2, "--metrics", "fid", "--images", sets / "two", "--out", tmp_path / "out")
    ran = run("evaluate", chain.artifact, *options)
    assert ran.code == 0, ran.err


def test_what_cannot_be_compared_is_one_line(run, sets, chain, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "add --metrics fid --images DIR" in run("evaluate", sets / "one", *out).complaint
    assert "Evaluate one kind at a time" in run("evaluate", sets / "one", chain.artifact, *out).complaint
    (tmp_path / "part").mkdir()
    for path in (sets / "two").iterdir():
        (tmp_path / "part" / path.name).write_bytes(path.read_bytes())
    described = json.loads((sets / "two" / "images.json").read_text())
    (tmp_path / "part" / "images.json").write_text(json.dumps(described | {"complete": False}))
    ran = run("evaluate", tmp_path / "part", "--metrics", "fid", "--images", sets / "one", *out)
    assert "part is not complete. Run edm-deploy generate again" in ran.complaint
