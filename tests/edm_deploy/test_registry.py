import pytest

import engines
from edm_deploy import models, registry
from edm_deploy.errors import UnsupportedError


def test_the_folder_is_the_registry():
    assert registry.names(models) == [
        "dit-transformer-2d",
        "flux-transformer-2d",
        "pixart-transformer-2d",
        "sd3-transformer-2d",
        "unet2d",
        "unet2d-condition",
    ]


def test_dash_and_underscore_are_the_same():
    assert registry.load(models, "unet2d_condition", "FAMILY") is registry.load(models, "unet2d-condition", "FAMILY")


def test_an_unknown_name_gets_the_nearest_and_all_that_there_are():
    with pytest.raises(UnsupportedError, match=r"Did you mean 'openvino'\? Known: .*ort"):
        registry.load(engines, "openvnio", "BACKEND")
