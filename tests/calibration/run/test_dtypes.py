from typing import get_args

import pytest

from calibration.run.dtypes import DTYPES, ComputeDtype, check_dtype
from edm_deploy.errors import InputError


def test_every_name_has_a_dtype():
    assert set(DTYPES) == set(get_args(ComputeDtype))


def test_another_name_is_refused_with_the_setting_and_the_choices():
    with pytest.raises(InputError, match=r"compute is 'fp8'; expected fp32 or bf16\. Set another compute\."):
        check_dtype("compute", "fp8")
