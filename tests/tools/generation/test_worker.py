from __future__ import annotations

import pickle

import numpy as np
import torch

from edm_deploy_tools.generation.plan import plan_of
from edm_deploy_tools.generation.worker import ShardWorker, joined
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.shards import read_shard


def test_keyword_arguments_of_images_are_joined():
    one, two = (
        {"batch_size": 1, "prompt": [name], "class_labels": torch.tensor([value]), "height": 8} for name, value in (("a", 3), ("b", 4))
    )
    together = joined([one, two])
    assert (together["batch_size"], together["prompt"], together["class_labels"].tolist(), together["height"]) == (2, ["a", "b"], [3, 4], 8)


def test_a_worker_is_called_as_map_batches_calls_it(chain, tmp_path):
    plan = pickle.loads(pickle.dumps(plan_of(chain.engine, GenerationRequest(num_images=4, steps=1), shard_images=2, batch=2)))
    rows = ShardWorker(plan, tmp_path)({"start": np.array([0, 2]), "stop": np.array([2, 4])})
    assert {name: len(values) for name, values in rows.items()} == dict.fromkeys(
        ("start", "stop", "sha256", "pid", "truncated", "error"), 2
    )
    assert [path.name for path in sorted(tmp_path.iterdir())] == [shard.name("webdataset") for shard in plan.shards]


def test_what_is_wrong_with_a_machine_is_in_the_rows(chain, tmp_path):
    plan = plan_of(chain.engine, GenerationRequest(num_images=1))
    rows = ShardWorker(plan, tmp_path, {"torch": "1.0"})({"start": np.array([0]), "stop": np.array([1])})
    assert "this process 1.0. Install the same versions" in rows["error"][0]
    rows = ShardWorker(plan_of(chain.engine, GenerationRequest(num_images=1, prompts=("a cat",))), tmp_path)(
        {"start": np.array([0]), "stop": np.array([1])}
    )
    assert "takes no text" in rows["error"][0]


def test_prompts_are_used_in_turn_and_recorded(prompted, tmp_path):
    request = GenerationRequest(prompts=("a cat", "a" * 100), num_images=3, steps=1)
    plan = plan_of(prompted.engine, request, shard_images=3, batch=4)
    rows = ShardWorker(plan, tmp_path)({"start": np.array([0]), "stop": np.array([3])})
    assert (rows["error"][0], rows["truncated"][0]) == ("", 1)
    records = list(read_shard(tmp_path / plan.shards[0].name("webdataset")))
    assert [record.prompt for record in records] == ["a cat", "a" * 100, "a cat"]
    assert records[0].png != records[2].png
