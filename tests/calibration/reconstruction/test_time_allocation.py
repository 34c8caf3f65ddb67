import pytest

from calibration.reconstruction.time_allocation import TimeAllocation, training_steps
from calibration.run.time_budget import Budget


def test_a_number_of_steps_divides_the_training_equally():
    assert list(training_steps(4, None)) == [(0.0, 0.25), (0.25, 0.25), (0.5, 0.25), (0.75, 0.25)]


def test_a_budget_divides_the_training_by_the_clock():
    times = iter([0.0, 0.0, 2.0, 5.0, 11.0])  # made, and after each step
    budget = Budget(10.0, clock=lambda: next(times))
    steps = list(training_steps(1000, budget))
    assert [share for share, _ in steps] == pytest.approx([0.0, 0.2, 0.5])
    assert [stride for _, stride in steps] == pytest.approx([0.0, 0.2, 0.3])


def test_what_is_left_is_divided_by_work():
    plan = TimeAllocation([10, 30], [100, 20])  # tasks of 1000, 3000, 200 and 600
    assert [plan.task_share(number, 60.0) for number in range(4)] == pytest.approx([1000 / 4800, 3000 / 3800, 200 / 800, 1.0])
    assert plan.done(1, 0.5) == pytest.approx(2500 / 4800)


def test_time_for_caches_that_are_still_to_be_filled_is_reserved():
    plan = TimeAllocation([10, 30], [1])  # the first runs 10 to fill its cache, the second 40
    plan.record_cache(0, 2.0)  # 0.2 s for each of them: 8 s are to come
    assert plan.task_share(0, 16.0) == pytest.approx(0.25 * 0.5)
    assert plan.task_share(0, 4.0) == 0.0
    assert plan.forward_passes(0) == pytest.approx(50 / 40)
