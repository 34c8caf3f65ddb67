from __future__ import annotations

import pytest

from edm_deploy.errors import InputError
from edm_deploy.manifest import Range
from edm_deploy_tools.profiles import build_options, range_of


def test_a_profile_is_three_numbers_or_one():
    assert range_of("batch", "1:8:16") == Range(1, 8, 16)
    assert range_of("batch", "4") == Range(4, 4, 4)


@pytest.mark.parametrize("text", ["1:8", "a", "1:8:", "-1", ""])
def test_anything_else_is_refused(text):
    with pytest.raises(InputError, match="expected MIN:OPT:MAX"):
        range_of("batch", text)


def test_only_given_sizes_are_in_the_options():
    options = build_options({"batch": "1:2:4", "height": None}, {"gpu": "rtx3090"})
    assert options.profile == {"batch": Range(1, 2, 4)}
    assert options.gpu == "rtx3090"


@pytest.mark.parametrize("asked", [{"optimization_level": 6}, {"threads": 0}, {"workspace_mib": 0}])
def test_numbers_outside_their_range_are_refused(asked):
    with pytest.raises(InputError, match="expected"):
        build_options({}, asked)
