from __future__ import annotations

from edm_deploy.runtime.manifest import TORCH_DTYPES
from edm_deploy_tools.common.options import FloatType, example


def test_float_types_are_those_of_a_manifest():
    assert {entry.value for entry in FloatType} == set(TORCH_DTYPES)


def test_an_example_begins_with_the_command():
    assert example("inspect x") == "Example: edm-deploy inspect x"
