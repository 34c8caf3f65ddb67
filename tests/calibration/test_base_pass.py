from dataclasses import dataclass
from typing import ClassVar

import pytest

from calibration.base_pass import Pass, check_passes, needs_quantized_inputs, needs_rows
from calibration.recipes.minmax import MinMax
from edm_deploy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Ranges(Pass):
    name: ClassVar[str] = "ranges"
    strength: float = 0.5

    def check(self, recipe, others):
        needs_quantized_inputs(self, recipe)
        needs_rows(self, recipe, 4)


def test_a_compatible_pass_is_accepted():
    check_passes([Ranges()], MinMax(rows=4))


def test_a_pass_given_twice_is_refused():
    with pytest.raises(InputError, match="Pass 'ranges' is given twice"):
        check_passes([Ranges(), Ranges(strength=0.1)], MinMax())


def test_a_pass_on_ranges_and_a_recipe_without_them_are_refused():
    with pytest.raises(
        InputError, match=r"'ranges' does not compose with act_bits 16: minmax leaves activations in floating point.*Leave it out"
    ):
        check_passes([Ranges()], MinMax(act_bits=16))


def test_too_few_rows_are_refused():
    with pytest.raises(InputError, match=r"'ranges' does not compose with minmax at rows 3: it needs 4 or more"):
        check_passes([Ranges()], MinMax(rows=3))


def test_settings_are_recorded_by_name():
    assert Ranges(strength=0.1).settings() == {"strength": 0.1}
