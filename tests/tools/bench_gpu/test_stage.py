import torch

from edm_deploy_tools.bench_gpu.stage import StageResult, StageRun


def test_on_the_cpu_a_call_is_timed_once():
    calls = []
    assert StageRun(device=torch.device("cpu")).seconds(lambda: calls.append(1)) > 0
    assert calls == [1]


def test_an_empty_result_has_no_problems():
    assert (StageResult().problems, StageResult().points) == ([], [])
