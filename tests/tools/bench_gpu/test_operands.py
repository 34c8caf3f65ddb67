import pytest
import torch

from edm_deploy_tools.bench_gpu.operands import ROWS, activation_table, compared, convolution_operands, name_of, operators_on
from engines.kernels import cuda_ops, torch_ops
from engines.kernels.operands import ConvShape


def test_a_share_of_the_values_may_differ():
    found, right = torch.zeros(1000), torch.zeros(1000)
    found[:5] = 1
    assert compared("k", found, right) == {"kernel": "k", "values": 1000, "wrong": 5, "ok": False}
    assert compared("k", found, right, share=0.005)["ok"]


@pytest.mark.parametrize("kind", ["s4", "u4", "s8"])
def test_operands_are_those_that_the_kernels_accept(kind):
    shape = ConvShape(N=2, H=9, W=9, Cb=0, K=72, R=3, S=3, P=9, Q=9, padding=1, stride=1)
    operands = convolution_operands(kind, torch.float16, shape, torch.Generator().manual_seed(0))
    found = operands.shape("test", (3, 3), 1, 1)
    assert (found.N, found.H, found.K, found.P) == (2, 9, 72, 9)


def test_tables_have_bounds_of_their_bits():
    rows, _, qmin, qmax, bits, unsigned = activation_table(7, 4, unsigned=True, device=torch.device("cpu"))
    assert (int(rows.max()), bits, unsigned) == (ROWS - 1, 4, True)
    assert set((qmax - qmin).tolist()) == {15}


def test_a_device_has_its_operators():
    assert operators_on(torch.device("cpu")) is torch_ops
    assert operators_on(torch.device("cuda")) is cuda_ops
    assert name_of(torch.bfloat16) == "bf16"
