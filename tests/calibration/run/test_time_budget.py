import itertools
from functools import partial

import pytest

from calibration import Interrupted, RunOptions, fit
from calibration.recipes.efficientdm import EfficientDM
from calibration.run.time_budget import Budget, seconds_of
from calibration.training import divergence
from edm_deploy.errors import ArtifactError, InputError
from tests.calibration.tiny import tiny_source
from tests.calibration.training.test_distillation import SETTINGS, interrupted_at


class Clock:
    """A clock that is set by the test."""

    now = 100.0

    def __call__(self):
        return self.now


def test_the_used_share_rises_from_0_to_1_and_not_further():
    clock = Clock()
    budget = Budget(10, clock=clock)
    assert (budget.share(), budget.left()) == (0, 10)
    clock.now += 4
    assert (budget.share(), budget.left(), budget.used()) == (0.4, 6, 4)
    clock.now += 8
    assert (budget.share(), budget.left(), budget.used()) == (1, 0, 12)


def test_a_part_starts_now_and_is_a_share_of_what_is_left():
    clock = Clock()
    whole = Budget(10, clock=clock)
    clock.now += 4
    half = whole.part(0.5)
    assert (half.seconds, half.share()) == (3, 0)
    clock.now += 3
    assert (half.share(), whole.share()) == (1, 0.7)
    clock.now += 3
    assert whole.part().share() == 1  # nothing left: nothing to train


def test_a_resumed_budget_includes_the_time_used_before():
    assert Budget(10, used=4, clock=Clock()).share() == 0.4


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("5m", 300), ("1h", 3600), ("1.5 m", 90)])
def test_durations_are_read_with_their_unit(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["5", "0s", "-3m", "five", "5d", "1h30m", ""])
def test_an_invalid_duration_is_refused_with_an_example(text):
    with pytest.raises(InputError, match="30s, 5m or 1h"):
        seconds_of(text)


@pytest.fixture
def ticking(monkeypatch):
    """Budgets of runs whose clock advances by one second per reading."""
    seconds = itertools.count()
    made = partial(Budget, clock=lambda: float(next(seconds)))
    monkeypatch.setattr("calibration.Budget", made)
    monkeypatch.setattr("calibration.run.checkpoint.Budget", made)


def test_training_stops_by_the_clock_and_the_provenance_states_the_steps(ticking, monkeypatch):
    shown, warnings = [], []
    monkeypatch.setattr(divergence.log, "warning", lambda text, *values: warnings.append(text % values))
    recipe, options = EfficientDM(**SETTINGS | {"steps": 1_000_000}), RunOptions(budget_seconds=20)
    artifact = fit(tiny_source(), recipe, options, on_progress=lambda now: shown.append(now))
    steps = [now.step for now in shown if now.stage == "finetune"]
    assert artifact.provenance["budget_seconds"] == 20
    assert artifact.provenance["steps_done"] == steps[-1] == len(steps) >= 3
    assert shown[-1].total < 100  # estimated by the clock, not from the recipe's steps
    assert any(f"The budget of 20 s had time for {len(steps)} training steps, fewer than 50" in warning for warning in warnings)


def test_a_budget_that_calibration_uses_up_is_refused_with_what_calibration_took(ticking):
    with pytest.raises(InputError, match=r"budget of 1 s leaves no step to train: calibration alone took 2 s. Set a --budget"):
        fit(tiny_source(), EfficientDM(**SETTINGS), RunOptions(budget_seconds=1))


def test_an_interrupted_run_continues_with_the_rest_of_its_budget(tmp_path, ticking):
    recipe, options = EfficientDM(**SETTINGS), {"checkpoint": tmp_path / "ck", "budget_seconds": 30}
    whole = fit(tiny_source(), recipe, RunOptions(budget_seconds=30)).provenance["steps_done"]
    with pytest.raises(Interrupted, match="after step 2"):
        fit(tiny_source(), recipe, RunOptions(**options), on_progress=interrupted_at(2))
    steps = []
    artifact = fit(tiny_source(), recipe, RunOptions(**options, resume=True), on_progress=lambda now: steps.append(now.step))
    assert steps[0] == 3
    assert artifact.provenance["steps_done"] == steps[-1] == pytest.approx(whole, abs=1)  # a look more, to save
    with pytest.raises(ArtifactError, match="budget_seconds is 30 there and None here"):
        fit(tiny_source(), recipe, RunOptions(checkpoint=tmp_path / "ck", resume=True))
