from __future__ import annotations

import pytest

from edm_deploy.errors import InputError
from edm_deploy_tools.generation.plan import GenerationPlan, first_difference, plan_of
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.shards import ShardRange


def plan(engine, **options):
    return GenerationPlan(**{"engine": engine, "engine_digest": "e", "request": GenerationRequest(num_images=5), "batch": 2} | options)


def test_settings_are_what_decides_an_image_without_number_and_paths(tmp_path):
    digest = plan(tmp_path).settings_digest
    assert plan(tmp_path / "copy", request=GenerationRequest(num_images=9)).settings_digest == digest
    for other in (
        plan(tmp_path, engine_digest="f"),
        plan(tmp_path, batch=4),
        plan(tmp_path, threads=2),
        plan(tmp_path, shard_format="parquet"),
        plan(tmp_path, request=GenerationRequest(num_images=5, steps=21)),
        plan(tmp_path, request=GenerationRequest(num_images=5, prompts=("a",))),
        plan(tmp_path, loras=((tmp_path, "digest", 0.5),)),
    ):
        assert other.settings_digest != digest


def test_the_first_difference_has_both_values(tmp_path):
    other = plan(tmp_path, request=GenerationRequest(num_images=5, steps=50))
    assert first_difference(plan(tmp_path).settings(), other.settings()) == "steps 20 there, 50 here"
    assert first_difference({}, {}) is None
    assert first_difference({"prompts": "0123456789" * 6}, {"prompts": None}) == 'prompts "0123456789012345678... there, null here'


def test_the_batch_is_that_of_the_engine_unless_one_is_given(chain):
    request = GenerationRequest(num_images=5)
    assert plan_of(chain.engine, request).batch == 4
    assert plan_of(chain.engine, request, shard_images=3).shards == [ShardRange(0, 3), ShardRange(3, 5)]
    with pytest.raises(InputError, match=r"--batch 9 is outside the engine's profile 1:4:8\. Choose a batch within it"):
        plan_of(chain.engine, request, batch=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "--threads 0: expected 1 or more"),
        ({"shard_images": 0}, "--shard-images 0: expected 1 or more"),
        ({"shard_format": "zip"}, "--format zip: expected webdataset or parquet"),
        ({"request": GenerationRequest(num_images=10**9)}, "--num-images 1000000000: expected at most 999999999"),
    ],
)
def test_numbers_outside_their_range_are_refused(tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        plan(tmp_path, **options)
