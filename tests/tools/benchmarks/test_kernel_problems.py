"""The operands of the kernel benchmark, on the CPU; the times need a GPU."""

import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy_tools.benchmarks.kernel_problems import BOUNDS, Problem, fits_int_mm, float_call, graph_seconds, int_mm_call
from edm_deploy_tools.benchmarks.layer_shapes import Layer

CPU = torch.device("cpu")
CONV, DOWN, LINEAR = Layer("conv", 20, 12, 6, 6, 3, 1, 1), Layer("conv", 20, 12, 6, 6, 3, 2, 1), Layer("linear", 24, 16, 10, 1, 1, 1, 1)


@pytest.mark.parametrize("kind", BOUNDS)
@pytest.mark.parametrize("layer", [CONV, DOWN, LINEAR], ids=str)
def test_a_problem_has_the_layer_s_shape_and_torch_s_agrees(layer, kind):
    problem = Problem(layer, 3, kind, CPU)
    problem.check("here")
    shape = (3, 10, 16) if layer.op == "linear" else (3, layer.K, layer.P, layer.Q)
    assert problem.sum().shape == shape
    assert torch.equal(problem.quantize(), problem.codes)
    assert float_call(layer, 3, CPU)().shape == shape


def test_bytes_are_those_of_codes_and_operands():
    problem = Problem(LINEAR, 2, "s4", CPU)  # 24 channels of 4 bits are 12 bytes, stored as 16
    assert problem.quantize_bytes == 2 * 10 * (24 * 2 + 16)
    assert problem.sum_bytes == 2 * 10 * 16 + 16 * 16


@pytest.mark.parametrize("kind", BOUNDS)
def test_a_wrong_bit_is_found(kind):
    problem = Problem(CONV, 2, kind, CPU)
    problem.codes[-1, 3, 3, 0] ^= 1
    with pytest.raises(UnsupportedError, match=rf"sd15, {kind}: 1 of \d+ values differ from the CPU's arithmetic. Nothing was timed."):
        problem.check(f"sd15, {kind}")


def test_torch_s_int8_matmul_is_used_only_for_supported_sizes():
    assert fits_int_mm(LINEAR, 2)
    assert not fits_int_mm(LINEAR, 1)  # 10 rows
    assert not fits_int_mm(CONV, 8)
    assert not fits_int_mm(Layer("linear", 20, 16, 64, 1, 1, 1, 1), 1)
    assert int_mm_call(LINEAR, 2, CPU)().shape == (20, 16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_time_is_of_one_call():
    """Twice the work in a call takes about twice as long; four times the calls do not."""
    x = torch.zeros(1 << 28, dtype=torch.uint8, device="cuda")
    once = graph_seconds([x.zero_], 30)
    assert 1.5 < graph_seconds([lambda: (x.zero_(), x.zero_())], 30) / once < 2.5
    assert 0.7 < graph_seconds([x.zero_] * 4, 30) / once < 1.4
