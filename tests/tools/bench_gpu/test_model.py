import torch

from edm_deploy_tools.bench_gpu import model
from edm_deploy_tools.bench_gpu.stage import StageRun
from edm_deploy_tools.benchmarks.traced_step import TracedModel
from engines.performance.gpus import gpu_named
from tests.conftest import tiny_model
from tests.engines.rewritten import program_of

RUN = StageRun(device=torch.device("cpu"), gpu=gpu_named("rtx3090"), small=True)


def test_a_whole_model_with_random_weights_runs_both_ways(monkeypatch):
    family, config, _ = tiny_model("unet2d")
    traced = TracedModel(family=family, config=config, program=program_of("unet2d"))
    found = model.whole_model(RUN, traced, 2)
    (rows,) = found.tables.values()
    assert found.problems == []
    assert [row["way"] for row in rows] == ["ours", "ours, attention in INT8", "torch eager"]
    assert all(row["ms"] > 0 and row["expected ms"] > 0 for row in rows)
    monkeypatch.setattr(model, "_session", lambda *_: 1 / 0)
    found = model.whole_model(RUN, traced, 2)
    assert [row["way"] for rows in found.tables.values() for row in rows] == ["torch eager"]
    assert found.problems == [f"{way}: ZeroDivisionError: division by zero" for way in ("ours", "ours, attention in INT8")]
