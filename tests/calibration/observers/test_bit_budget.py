from dataclasses import replace

import pytest

from calibration.base_pass import SitePrice
from calibration.observers.bit_budget import Budget, Costs, choose, costs_of
from calibration.student.quantization_spec import W8A8, LayerSpec
from edm_deploy.errors import InputError

A4 = LayerSpec(4, 4, symmetric=False)
SPECS = {"in": W8A8, "q": A4, "k": A4, "out": A4}
MACS = {"in": 10, "q": 20, "k": 20, "out": 50}
GROUPS = [("q", "k"), ("out",)]
PRICES = {"in": SitePrice(9.0, 10.0), "q": SitePrice(1.0, 2.0), "k": SitePrice(1.0, 2.0), "out": SitePrice(3.0, 6.0)}  # of int8: 20


@pytest.mark.parametrize(
    ("text", "least", "added", "most"),
    [
        ("avg_act_bits=5.0", 0.1 * 8 + 0.9 * 4, [0.4 * 4, 0.5 * 4], 5.0),
        ("int4=0.75", 0.1, [0.4, 0.5], 0.25),  # the cost is the share that is not in INT4
        ("time=0.9x", (10 + 1 + 1 + 3) / 20, [2 / 20, 3 / 20], 0.9),
    ],
)
def test_costs_are_in_the_unit_of_the_budget(text, least, added, most):
    budget = Budget.parse(text)
    assert str(budget) in (text, text.replace("5.0", "5"))
    costs = costs_of(budget, SPECS, GROUPS, MACS, PRICES)
    assert costs.least == pytest.approx(least)
    assert costs.added == pytest.approx(added)
    assert costs.most == pytest.approx(most)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5.0", "expected avg_act_bits=5.0 .* int4=0.75 .* or time=0.9x"),
        ("int4=", "allocate.budget is 'int4='"),
        ("int4=1.5", "allocate.budget int4 is 1.5; expected 0.0 to 1.0"),
        ("int4=.", "allocate.budget is 'int4=.'"),
        ("time=0.9", "allocate.budget is 'time=0.9'"),
        ("avg_act_bits=9", "allocate.budget avg_act_bits is 9.0; expected 3 to 8"),
        ("avg_act_bits=nan", "allocate.budget is"),
    ],
)
def test_a_budget_of_another_form_or_range_is_refused(text, message):
    with pytest.raises(InputError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "nearest"),
    [("avg_act_bits=4.0", "avg_act_bits=4.4"), ("int4=0.95", "int4=0.9"), ("time=0.5x", "time=0.75x"), ("time=0.74x", "time=0.75x")],
)
def test_a_budget_that_no_allocation_meets_names_the_nearest_that_one_does(text, nearest):
    with pytest.raises(
        InputError, match=f"No allocation meets allocate.budget {text.replace('4.0', '4')}\\. Set allocate.budget={nearest},"
    ):
        costs_of(Budget.parse(text), SPECS, GROUPS, MACS, PRICES)
    costs_of(Budget.parse(nearest), SPECS, GROUPS, MACS, PRICES)


def test_groups_without_a_cost_make_room_and_those_without_a_gain_are_left():
    costs = Costs(least=1.0, added=[1.0, 2.0, 1.5, 0.5, -1.0], most=3.0)
    assert choose([4.0, 1.0, 6.6, 1.0, 0.1], costs) == [0, 2, 3, 4]  # -1 makes room for 3.0, which 1 + 1.5 + 0.5 use up
    assert choose([0.0] * 5, costs) == [4]
    assert choose([4.0, 1.0, 6.6, 1.0], replace(costs, added=costs.added[:4])) == [2, 3]  # 7.6 in 2.0; 4 + 1 is less
    assert choose([1.0] * 3, Costs(least=1.0, added=[0.1, 0.2, 0.3], most=1.0)) == []


def test_the_choice_is_the_best_of_all_subsets():
    import itertools

    gains, added = [5.0, 4.0, 3.0, 2.5, 1.0, 7.0], [2.0, 1.7, 1.5, 0.9, 0.6, 3.1]
    for most in (0.5, 1.05, 2.35, 4.05, 6.55, 9.05):
        subsets = (chosen for size in range(7) for chosen in itertools.combinations(range(6), size))
        best = max(sum(gains[i] for i in chosen) for chosen in subsets if sum(added[i] for i in chosen) <= most)
        found = choose(gains, Costs(least=0.0, added=added, most=most))
        assert sum(added[i] for i in found) <= most
        assert sum(gains[i] for i in found) == pytest.approx(best)


def test_many_small_groups_use_the_budget_up_although_their_costs_are_rounded():
    assert len(choose([1.0] * 1000, Costs(least=0.0, added=[0.001] * 1000, most=0.5))) == 500
