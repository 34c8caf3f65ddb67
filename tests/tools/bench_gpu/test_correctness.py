import pytest
import torch

from edm_deploy_tools.bench_gpu import branches, correctness
from edm_deploy_tools.bench_gpu.stage import StageRun
from engines.kernels import build, cuda_ops, quantize_branch, rotary, torch_ops
from engines.kernels.launch import entry_points
from tests.engines.kernels.conftest import launched

__all__ = ["launched"]
RUN = StageRun(device=torch.device("cpu"), small=True)


@pytest.mark.extended  # a hundred kernels under the emulator
def test_the_stage_starts_every_kernel_and_finds_none_wrong(launched, monkeypatch):
    """cuda_ops on CPU tensors: each launch goes to the emulator."""
    for module in (correctness, branches):
        monkeypatch.setattr(module, "operators_on", lambda device: cuda_ops)
    monkeypatch.setattr(branches, "branch_on", lambda device: quantize_branch.on_cuda)
    monkeypatch.setattr(correctness, "rotary_on", lambda device: rotary.on_cuda)
    found = correctness.kernels(RUN)
    assert found.problems == []
    assert set(launched) == {name for source in (build.MAIN, build.ROTATED, build.BRANCH, build.DOWN) for name in entry_points(source)}


def test_a_wrong_value_is_named(monkeypatch):
    class Wrong:
        quantize, group_stats = staticmethod(torch_ops.quantize), staticmethod(torch_ops.group_stats)
        quantize_rows = staticmethod(torch_ops.quantize_rows)

        @staticmethod
        def convolve(operands, shape, dtype, *, on):
            y = torch_ops.convolve(operands, shape, dtype)
            if (operands.kind, on[0].name, on[1]) == ("u4", "64x64", 3):
                y[0, 0, 0, 0] += 1
            return y

    monkeypatch.setattr(correctness, "operators_on", lambda device: Wrong)
    found = correctness.kernels(RUN)
    assert found.problems == [f"conv u4 64x64 {dtype}, 3 splits: 1 of 11664 values differ from the CPU's." for dtype in ("f16", "bf16")]
    assert found.facts["kernels"] - found.facts["correct"] == 2
