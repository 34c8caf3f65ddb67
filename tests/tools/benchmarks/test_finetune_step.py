from __future__ import annotations

import pytest

from calibration.recipes.efficientdm import EfficientDM
from edm_deploy.errors import EdmDeployError, InputError
from edm_deploy.pipelines.source import load_source
from edm_deploy_tools.benchmarks.finetune_step import StepCost, TrainingCost, bench_finetune_step, step_cost
from tests.calibration.tiny import tiny_source


def test_the_ratio_is_step_over_float():
    cost = StepCost(float_seconds=2.0, step_seconds=1.5, float_peak_bytes=None, step_peak_bytes=None, batch=1, repeats=1)
    assert cost.ratio == 0.75


def test_times_are_relative_to_the_float_step():
    cost = StepCost(float_seconds=2.0, step_seconds=1.5, float_peak_bytes=None, step_peak_bytes=2_300_000_000, batch=32, repeats=7)
    first, second = TrainingCost(conditions={}, cost=cost).rows()
    assert (first["of the float step"], first["peak GB"]) == (1.0, None)
    assert (second["of the float step"], second["peak GB"], second["n"]) == (0.75, 2.3, 7)


def test_a_batch_of_no_samples_is_refused():
    with pytest.raises(InputError, match="--batch 0"):
        bench_finetune_step("./nothing", batch=0, rounds=1)


def test_the_time_of_both_is_measured():
    cost = step_cost(tiny_source(), EfficientDM(rank=2), batch=2, repeats=1, memory=False)
    assert cost.float_seconds > 0
    assert cost.step_seconds > 0
    assert (cost.float_peak_bytes, cost.step_peak_bytes) == (None, None)


@pytest.mark.extended  # two new processes
def test_time_and_peak_memory_of_both_are_measured(save_tiny_pipeline, tmp_path):
    source = load_source(save_tiny_pipeline(tmp_path / "p"))
    cost = step_cost(source, EfficientDM(rank=2), batch=2, repeats=1)
    assert cost.float_seconds > 0
    assert cost.step_seconds > 0
    # A process with torch in it takes more than 100 MB and, for a tiny model, far less than 4 GB.
    assert all(100e6 < peak < 4e9 for peak in (cost.float_peak_bytes, cost.step_peak_bytes))


@pytest.mark.extended  # tests/tools/common/test_child_process.py has a failing process in every run
def test_a_process_that_fails_is_one_clear_error():
    with pytest.raises(EdmDeployError, match="measures the memory of 'float' failed"):
        step_cost(tiny_source(), EfficientDM(rank=2), batch=2, repeats=1)
