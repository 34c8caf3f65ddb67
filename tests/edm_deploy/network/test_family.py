import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.family import ModelInput


def test_a_class_of_diffusers_finds_its_family():
    assert name_of_family("UNet2DConditionModel") == "unet2d-condition"


def test_a_class_without_a_family_gets_the_nearest_and_the_way_to_add_one():
    with pytest.raises(UnsupportedError, match=r"Did you mean 'UNet2DModel'\?.*write edm_deploy/models/<name>\.py"):
        name_of_family("UNet1DModel")


def test_a_float_input_follows_the_dtype_of_the_graph():
    assert ModelInput("sample", "float", ("batch", 3)).dtype(torch.float16) == torch.float16
    assert ModelInput("timestep", "float32", ("batch",)).dtype(torch.float16) == torch.float32


def test_padding_that_is_not_zero_is_refused():
    family = family_named("unet2d")
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"))
    with pytest.raises(UnsupportedError, match="Site '0' pads with 'circular'"):
        family.sites(model)
