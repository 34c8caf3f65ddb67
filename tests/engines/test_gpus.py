import pytest

from edm_deploy.errors import UnsupportedError
from engines._gpus import capabilities, capability


@pytest.mark.parametrize("name", ["rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090", "rtx-3090", "sm_86", "sm86", "SM_86", "8.6"])
def test_a_gpu_is_known_by_every_way_to_write_it(name):
    assert capability(name) == "sm_86"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtx3080", "sm_86"),
        ("rtx4090", "sm_89"),
        ("a10", "sm_86"),
        ("a100", "sm_80"),
        ("H200", "sm_90"),
        ("rtx5090", "sm_120"),
        ("10.0", "sm_100"),
    ],
)
def test_compute_capabilities_are_nvidias(name, expected):
    assert capability(name) == expected


def test_several_names_give_each_capability_once():
    assert capabilities("rtx3090, rtx3080, rtx4090") == ("sm_86", "sm_89")


@pytest.mark.parametrize(("name", "nearest"), [("rtx3900", "rtx3090"), ("rtx409", "rtx4090")])
def test_an_unknown_gpu_is_refused_with_the_nearest(name, nearest):
    with pytest.raises(UnsupportedError, match=f"Did you mean '{nearest}'"):
        capability(name)


def test_a_compute_capability_that_does_not_exist_is_refused():
    with pytest.raises(UnsupportedError, match="No GPU 'sm_33' is known"):
        capability("sm_33")
