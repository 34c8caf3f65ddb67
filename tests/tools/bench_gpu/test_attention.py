import pytest
import torch

from edm_deploy_tools.bench_gpu import attention
from edm_deploy_tools.bench_gpu.stage import StageRun
from engines.kernels.attention import cpu, cuda
from engines.kernels.attention.launch import entry_points
from engines.performance.gpus import gpu_named
from tests.engines.kernels.conftest import launched

__all__ = ["launched"]
RUN = StageRun(device=torch.device("cpu"), gpu=gpu_named("rtx3090"), small=True)


def results() -> list[dict]:
    return attention.attention_results(RUN, torch.Generator().manual_seed(0))


@pytest.mark.extended  # twenty calls under the emulator
def test_every_kernel_is_started_and_none_is_wrong(launched, monkeypatch):
    """The launches of a GPU, in the emulator."""
    monkeypatch.setattr(attention, "attention_on", lambda device: cuda)
    assert [row for row in results() if not row["ok"]] == []
    assert set(launched) == set(entry_points())


def test_a_wrong_head_is_named(monkeypatch):
    class Wrong:
        @staticmethod
        def attention(operands):
            y = cpu.attention(operands).clone()
            if operands.query.shape[-1] == 120 and operands.query.dtype == torch.bfloat16:
                y[1, 1] = y[1, 0]
            return y

    monkeypatch.setattr(attention, "attention_on", lambda device: Wrong)
    wrong = [row for row in results() if not row["ok"]]
    assert [row["kernel"] for row in wrong] == ["attention 128 bfloat16 70x70", "attention 128 bfloat16 40x150"]
    assert all(row["wrong"] > 0 for row in wrong)


def test_ours_is_timed_beside_torchs_and_both_expected_times():
    (row,) = attention.attention_times(RUN)
    assert row["heads"] == "[1, 2, 64, 40]"
    assert min(row[name] for name in ("torch us", "int8 us", "torch expected us", "int8 expected us")) > 0
    assert 0 < row["relative error"] < 0.02
