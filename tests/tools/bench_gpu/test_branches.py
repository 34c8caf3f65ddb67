"""What the stage compares of branches and rotations; that each kernel is started is in test_correctness.py."""

import pytest
import torch

from edm_deploy_tools.bench_gpu import branches
from edm_deploy_tools.bench_gpu.stage import StageRun
from engines.kernels import quantize_branch, torch_ops

RUN = StageRun(device=torch.device("cpu"), small=True)


@pytest.mark.parametrize("results", [branches.rotated_results, branches.branch_results, branches.down_results])
def test_every_case_is_compared_and_right(results):
    rows = results(RUN, torch.Generator().manual_seed(0))
    assert len({row["kernel"] for row in rows}) == len(rows) >= 36
    assert all(row["ok"] and row["values"] for row in rows)


def test_a_branch_that_is_left_out_is_noticed(monkeypatch):
    class Without:
        @staticmethod
        def convolve(operands, shape, dtype, *, on):
            plain = vars(operands) | {"low": None, "up": None}
            return torch_ops.convolve(type(operands)(**plain), shape, dtype)

    monkeypatch.setattr(branches, "operators_on", lambda device: Without)
    assert not any(row["ok"] for row in branches.branch_results(RUN, torch.Generator().manual_seed(0)))


def test_a_product_of_other_values_is_noticed(monkeypatch):
    def wrong(x, operands, table):
        codes, low = quantize_branch.on_cpu(x, operands, table)
        return codes, low * 1.1

    monkeypatch.setattr(branches, "branch_on", lambda device: wrong)
    rows = branches.down_results(RUN, torch.Generator().manual_seed(0))
    assert {row["ok"] for row in rows if row["kernel"].endswith("product")} == {False}
    assert {row["ok"] for row in rows if not row["kernel"].endswith("product")} == {True}
