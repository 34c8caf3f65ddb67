import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calibration.run import progress
from calibration.run.options import Run, RunOptions
from calibration.run.progress import ProgressMeter

CPU = torch.device("cpu")


@pytest.fixture
def meter(monkeypatch):
    """A meter at 10 seconds since its start, resumed after 4 steps, and the list of its reports."""
    times = iter([100.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(times, 110.0))
    reports = []
    return ProgressMeter(Run(options=RunOptions(), identity={}, on_progress=reports.append), "finetune", CPU, first_step=4), reports


def test_rate_and_remaining_time_count_only_the_steps_since_the_start(meter):
    meter, reports = meter
    meter.report(9, 20, loss=0.5)  # 5 steps in 10 seconds, 11 to go
    (report,) = reports
    assert (report.stage, report.step, report.total, report.loss, report.rate, report.eta_seconds) == ("finetune", 9, 20, 0.5, 0.5, 22.0)
    assert report.memory_bytes > 1e6


def test_a_stage_may_give_its_own_rate_and_remaining_time(meter):
    meter, reports = meter
    meter.report(500, 1000, rate=meter.rate(34), eta_seconds=10.0)
    assert (reports[0].rate, reports[0].eta_seconds) == (3.0, 10.0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_are_noticed_inside_the_context(number, meter):
    meter, _ = meter
    with meter:
        assert not meter.interrupted
        signal.raise_signal(number)
        assert meter.interrupted


def test_an_interruption_states_where_the_checkpoint_is(meter):
    meter, _ = meter
    assert str(meter.interruption("step 3")) == "Interrupted after step 3; nothing was saved, because the run has no checkpoint directory."
    run = replace(meter._run, options=RunOptions(checkpoint=Path("ck")))
    message = str(ProgressMeter(run, "finetune", CPU).interruption("step 3"))
    assert message == "Interrupted after step 3; the state is in ck. Run the same command with --resume to continue."
