from __future__ import annotations

import pytest

from edm_deploy.errors import InputError
from edm_deploy_tools.benchmarks.finetune_step import TrainingCost, bench_finetune_step
from edm_deploy_tools.benchmarks.step_cost import StepCost


def test_the_step_is_told_relative_to_the_float_step():
    cost = StepCost(float_seconds=2.0, step_seconds=1.5, float_peak_bytes=None, step_peak_bytes=2_300_000_000, batch=32, repeats=7)
    first, second = TrainingCost(conditions={}, cost=cost).rows()
    assert (first["of the float step"], first["peak GB"]) == (1.0, None)
    assert (second["of the float step"], second["peak GB"], second["n"]) == (0.75, 2.3, 7)


def test_no_samples_are_refused():
    with pytest.raises(InputError, match="--batch 0"):
        bench_finetune_step("./nothing", batch=0, rounds=1)
