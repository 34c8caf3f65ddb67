import pytest

from calibration.run.setting_checks import at_least, within
from edm_deploy.errors import InputError


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_value_below_the_minimum_is_refused_by_name(value):
    with pytest.raises(InputError, match=rf"steps is {value}; expected at least 1\. Set another steps\."):
        at_least("steps", value, 1)


def test_infinity_is_refused_by_name():
    with pytest.raises(InputError, match=r"scale_rate is inf; expected a finite number, at least 0\. Set another scale_rate\."):
        at_least("scale_rate", float("inf"), 0)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_value_outside_its_range_is_refused_by_name(value):
    with pytest.raises(InputError, match=rf"eta is {value}; expected 0\.0 to 1\.0\. Set another eta\."):
        within("eta", value, 0.0, 1.0)


def test_the_ends_of_a_range_are_legal():
    at_least("steps", 1, 1)
    within("eta", 0.0, 0.0, 1.0)
    within("eta", 1.0, 0.0, 1.0)
