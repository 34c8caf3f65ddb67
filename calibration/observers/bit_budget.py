"""Budgets of bit allocation, and the choice of what gets more bits within one."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from calibration.base_pass import SitePrice
from calibration.run.setting_checks import within
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import ACTIVATION_BITS

Measure = Literal["avg_act_bits", "int4", "time"]
INT4_BITS = 4  # at most so many bits of weight and input have INT4 kernels
RAISED_BITS = 8  # of inputs that are raised
GRID = 4096
_FORMS = "avg_act_bits=5.0 (average bits of the inputs), int4=0.75 (share of the work in INT4) or time=0.9x (of the expected time in INT8)"


@dataclass(frozen=True)
class Budget:
    """What an allocation must keep to.

    Attributes:
        measure: `avg_act_bits`: bits of the inputs averaged over the multiply-accumulates of the sites, at most `limit`. `int4`: share of these
            multiply-accumulates that INT4 kernels can do, at least `limit`. `time`: expected time of the sites relative to that in INT8 throughout,
            at most `limit`.
        limit: 3 to 8, 0 to 1, or above 0.
    """

    measure: Measure
    limit: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget from `avg_act_bits=5.0`, `int4=0.75` or `time=0.9x`.

        Raises:
            InputError: Another form, or a number outside its range.
        """
        found = re.fullmatch(r"(avg_act_bits|int4)=([0-9.]+)|(time)=([0-9.]+)x", text.replace(" ", ""))
        measure, number = (found[1] or found[3], found[2] or found[4]) if found else ("", "")
        try:
            limit = float(number)
        except ValueError:
            raise InputError(f"allocate.budget is {text!r}; expected {_FORMS}. Set another allocate.budget.") from None
        low, high = {"avg_act_bits": (ACTIVATION_BITS.start, ACTIVATION_BITS.stop - 1), "int4": (0.0, 1.0), "time": (0.0, 10.0)}[measure]
        within(f"allocate.budget {measure}", limit, low, high)
        return cls(measure, limit)  # type: ignore[arg-type]  # the expression matches these names only

    def __str__(self) -> str:
        return f"{self.measure}={self.limit:g}" + ("x" if self.measure == "time" else "")


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What allocations cost, in the unit of a budget.

    Attributes:
        least: Cost of the allocation that raises nothing.
        added: Cost that each group adds where it is raised; 0 or less where INT8 is no slower.
        most: Cost that the budget allows.
    """

    least: float
    added: Sequence[float]
    most: float


def costs_of(
    budget: Budget,
    specs: Mapping[str, LayerSpec],
    groups: Sequence[Sequence[str]],
    macs: Mapping[str, int],
    prices: Mapping[str, SitePrice],
) -> Costs:
    """The costs of a budget.

    Args:
        budget: In `int4` the cost is the share of the work that INT4 kernels cannot do.
        specs: Bits of every site before any is raised.
        groups: Sites that are raised together.
        macs: Multiply-accumulates of every site.
        prices: Expected times of every site, for a budget of time.

    Raises:
        InputError: No allocation meets the budget; the message names the nearest that one does.
    """
    total = sum(macs[name] for name in specs)

    def cost(name: str, *, raised: bool) -> float:
        spec = specs[name]
        act_bits = spec.act_bits if spec.act_bits is not None else 16
        act_bits = RAISED_BITS if raised else act_bits
        narrow = spec.weight_bits <= INT4_BITS and act_bits <= INT4_BITS
        if budget.measure == "avg_act_bits":
            return act_bits * macs[name] / total
        if budget.measure == "int4":
            return 0.0 if narrow else macs[name] / total
        return (prices[name].int4 if narrow else prices[name].int8) / sum(prices[each].int8 for each in specs)

    least = sum(cost(name, raised=False) for name in specs)
    added = [sum(cost(name, raised=True) - cost(name, raised=False) for name in group) for group in groups]
    most = 1 - budget.limit if budget.measure == "int4" else budget.limit
    nearest = least + sum(min(each, 0.0) for each in added)
    if nearest > most + 1e-9:
        raise InputError(
            f"No allocation meets allocate.budget {budget}. Set allocate.budget={_nearest(budget.measure, nearest)}, the nearest that one meets."
        )
    return Costs(least=least, added=added, most=most)


def _nearest(measure: Measure, cost: float) -> str:
    """The tightest budget that a cost meets, rounded to the looser side."""
    if measure == "int4":
        return f"int4={math.floor((1 - cost) * 1000 + 1e-6) / 1000:g}"
    return f"{measure}={math.ceil(cost * 1000 - 1e-6) / 1000:g}" + ("x" if measure == "time" else "")


def choose(gains: Sequence[float], costs: Costs) -> list[int]:
    """Indices of the groups that are raised: the subset of largest total gain that the budget allows, a 0/1 knapsack problem.

    Gains are taken to add up. Solved by dynamic programming over costs that are rounded up to 1 / GRID of what the budget leaves, so that it is always
    met; what the rounding leaves over is filled in the order of gain per cost.

    Args:
        gains: Error that raising each group removes, >= 0; a group that costs something and gains nothing is not raised.
        costs: Of each group. One of cost 0 or less is raised in any case.
    """
    chosen = [index for index, cost in enumerate(costs.added) if cost <= 0]
    paid = [index for index, cost in enumerate(costs.added) if cost > 0 and gains[index] > 0]
    left = costs.most - costs.least - sum(costs.added[index] for index in chosen)
    units = {index: math.ceil(costs.added[index] / left * GRID - 1e-6) if left > 0 else GRID + 1 for index in paid}
    best, taken = torch.zeros(GRID + 1, dtype=torch.float64), {}
    for index in (index for index in paid if units[index] <= GRID):
        with_it = best[: GRID + 1 - units[index]] + gains[index]
        taken[index] = with_it > best[units[index] :]
        best[units[index] :] = torch.maximum(with_it, best[units[index] :])
    at = GRID
    for index in reversed(taken):
        if at >= units[index] and bool(taken[index][at - units[index]]):
            chosen.append(index)
            at -= units[index]
            left -= costs.added[index]
    for index in sorted(set(paid) - set(chosen), key=lambda index: -gains[index] / costs.added[index]):
        if costs.added[index] <= left + 1e-9:
            chosen.append(index)
            left -= costs.added[index]
    return sorted(chosen)
