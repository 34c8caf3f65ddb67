import pytest

from calibration.training import divergence
from calibration.training.divergence import check_finite, warn_if_few, warn_if_risen
from edm_deploy.errors import InputError


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused_with_its_position(loss):
    with pytest.raises(InputError, match=f"the loss is {loss} after step 7 of 9, expected a finite number. Set lower rates"):
        check_finite(loss, "step 7 of 9")
    check_finite(1e30, "step 7 of 9")


def test_a_loss_that_has_risen_is_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(divergence.log, "warning", lambda text, *values: warnings.append(text % values))
    warn_if_risen(15.0, [600.0, 624.0])
    warn_if_risen(15.0, [14.0, 45.0])
    warn_if_risen(15.0, [])
    assert warnings == ["Training diverged: the loss rose from 15 to 612, so the result is worse than without training. Set lower rates."]


def test_a_budget_for_a_few_steps_is_a_warning(monkeypatch):
    warnings = []
    monkeypatch.setattr(divergence.log, "warning", lambda text, *values: warnings.append(text % values))
    warn_if_few(50, 60.0)
    assert not warnings
    warn_if_few(49, 60.0)
    assert warnings[0].startswith(
        "The budget of 60 s had time for 49 training steps, fewer than 50: the result can be worse than calibration alone."
    )
