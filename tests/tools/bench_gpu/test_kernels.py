import torch

from edm_deploy_tools.bench_gpu import kernels
from edm_deploy_tools.bench_gpu.stage import StageRun
from engines.performance.gpus import gpu_named

RUN = StageRun(device=torch.device("cpu"), gpu=gpu_named("rtx3090"), small=True)


def test_each_operator_stands_beside_torchs_and_its_expected_time():
    rows, attention = kernels.operators(RUN).tables.values()
    names = [row["operator"].split(" [")[0] for row in rows]
    assert {"group_stats", "quantize_normed, SiLU", "torch: group_norm, SiLU", "torch: layer_norm"} <= set(names)
    assert [row["heads"] for row in attention] == ["[1, 2, 64, 40]"]
    assert all(row["us"] > 0 and row["expected us"] > 0 for row in rows)


def test_each_layer_is_a_point_of_the_profile():
    found = kernels.layers(RUN)
    (rows,) = found.tables.values()
    assert [row["layer"] for row in rows] == ["conv 3x3 32->32, 8x8", "linear 256->32, 24 tokens"]
    assert {point["precision"] for point in found.points} == {"float16", "int8", "int4"}
    assert found.points[0]["shape"] == {"rows": 128, "channels": 32, "taps": 9, "outputs": 32}


def test_a_peer_that_fails_is_a_problem_of_its_own(monkeypatch):
    def fail(layer, batch, device):
        raise RuntimeError("no kernel for this GPU\nand more")

    monkeypatch.setattr(kernels, "comfy_kitchen_calls", fail)
    found = kernels.layers(RUN)
    assert found.problems[-1] == "comfy-kitchen, linear 256->32, 24 tokens: RuntimeError: no kernel for this GPU"
    assert all("ours with quantize, over float16" in row for rows in found.tables.values() for row in rows)


def test_without_int4_tensor_cores_four_bits_are_not_timed():
    run = StageRun(device=torch.device("cpu"), gpu=gpu_named("h100"), small=True)
    (rows,) = kernels.layers(run).tables.values()
    assert all("int4 us" not in row for row in rows)


def test_versions_name_what_is_missing():
    facts = kernels.versions(RUN).facts
    assert facts["torch"] == torch.__version__
    assert facts["device"] == "cpu"
    assert facts["compute-sanitizer"]
