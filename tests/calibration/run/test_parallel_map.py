import pytest
import torch

from calibration.run.parallel_map import parallel_map


def test_results_come_in_the_order_of_the_items():
    assert parallel_map(lambda n: n * n, range(20)) == [n * n for n in range(20)]


def test_each_item_has_one_thread_and_torchs_count_is_restored():
    before = torch.get_num_threads()
    assert set(parallel_map(lambda _: torch.get_num_threads(), range(8))) == {1}
    assert torch.get_num_threads() == before


def test_an_exception_is_raised_and_torchs_thread_count_restored():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        parallel_map(lambda n: 1 / n, [1, 0])
    assert torch.get_num_threads() == before
