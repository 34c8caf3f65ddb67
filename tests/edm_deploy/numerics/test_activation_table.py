import pytest
import torch

from edm_deploy.numerics.activation_table import ActivationTable, nearest_rows, quantize_activation, table_rows


def table(scale=(0.5, 1.0), qmin=(-3, -8), qmax=(12, 7), bits=4):
    return ActivationTable(
        bits=bits, scale=torch.tensor(scale), qmin=torch.tensor(qmin, dtype=torch.int8), qmax=torch.tensor(qmax, dtype=torch.int8)
    )


def test_each_sample_is_quantized_at_its_row():
    x = torch.tensor([[-5.0, 1.0, 20.0], [-20.0, 1.0, 20.0]])
    assert quantize_activation(x, table(), torch.tensor([0, 1])).tolist() == [[-3, 2, 12], [-8, 1, 7]]


def test_some_rows_of_a_table_are_a_table():
    part = table().at_rows(torch.tensor([1, 1]))
    assert (part.bits, part.scale.tolist(), part.qmin.tolist(), part.qmax.tolist()) == (4, [1.0, 1.0], [-8, -8], [7, 7])


def test_rounding_is_half_to_even():
    x = torch.tensor([[0.25, 0.75, 1.25]])
    assert quantize_activation(x, table(), torch.tensor([0])).tolist() == [[0, 2, 2]]


def test_real_zero_is_code_zero_at_every_row():
    assert quantize_activation(torch.zeros(2, 4), table(), torch.tensor([0, 1])).abs().sum() == 0


def test_the_reciprocal_is_rounded_once_from_the_exact_quotient():
    assert torch.equal(table(scale=(0.1, 3.0)).inv_scale, (1 / torch.tensor([0.1, 3.0]).double()).float())


def test_row_takes_the_nearest_timestep_and_of_two_the_smaller():
    assert nearest_rows([0, 4, 6], 8).tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


def test_fractional_timesteps_round_and_foreign_ones_clip():
    rows = nearest_rows([0, 500, 999], 1000)
    assert table_rows(rows, torch.tensor([0.4, 473.7, 998.5, 5000.0, -3.0])).tolist() == [0, 1, 2, 2, 0]


def test_where_every_timestep_has_a_row_each_takes_its_own():
    rows = nearest_rows(range(8), 8)
    assert table_rows(rows, torch.tensor([0.0, 3.0, 3.4, 3.6, 7.0])).tolist() == [0, 3, 3, 4, 7]


def test_a_table_of_equal_rows_is_constant():
    assert table(scale=(0.5, 0.5), qmin=(-3, -3), qmax=(12, 12)).is_constant
    assert not table(scale=(0.5, 0.5)).is_constant


def test_equal_tables_quantize_alike():
    assert table().equals(table())
    assert not table().equals(table(scale=(0.5, 1.1)))


@pytest.mark.parametrize(
    ("broken", "problem"),
    [
        ({"scale": (0.5, float("nan"))}, "not finite and positive"),
        ({"scale": (0.5, 0.0)}, "not finite and positive"),
        ({"scale": (0.5, -1.0)}, "not finite and positive"),
        ({"qmin": (1, -8)}, "exclude code 0"),
        ({"qmax": (-1, 7)}, "exclude code 0"),
        ({"qmin": (-8, -8), "qmax": (8, 7)}, "span 17 codes, more than the 16 of 4 bits"),
        ({"scale": (0.5, 1.0, 2.0)}, r"act_scale has shape \[3\], expected \[2\]"),
    ],
)
def test_a_broken_table_says_what_is_wrong(broken, problem):
    import re

    assert re.search(problem, table(**broken).problem(2) or "")


def test_a_good_table_has_no_problem():
    assert table().problem(2) is None
