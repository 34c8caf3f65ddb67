from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from edm_deploy.runtime.backend import BuildOptions
from edm_deploy_tools.common.cuda_options import AttentionProducts, Int4Sites, RestOfGraph
from engines.cuda import BACKEND


@pytest.mark.parametrize(("name", "choices"), [("int4_where", Int4Sites), ("rest", RestOfGraph), ("attention", AttentionProducts)])
def test_each_option_has_the_values_that_the_backend_takes(name, choices):
    literal, _ = get_args(get_type_hints(BuildOptions)[name])
    assert {choice.value for choice in choices} == set(get_args(literal))
    assert name in BACKEND.options
