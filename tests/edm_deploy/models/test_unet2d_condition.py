import pytest
import torch

from edm_deploy.errors import UnsupportedError
from edm_deploy.family import family_named, skeleton
from tests.conftest import TINY_CONDITION_UNET

FAMILY = family_named("unet2d-condition")


def test_tokens_are_an_input_of_any_length():
    assert FAMILY.inputs(TINY_CONDITION_UNET)[2].dims == ("batch", "tokens", 12)


def test_the_cross_attention_is_quantized():
    sites = FAMILY.sites(skeleton(FAMILY, TINY_CONDITION_UNET))
    assert any(name.endswith("attn2.to_k") and FAMILY.placement(name) == "quantize" for name in sites)


@pytest.mark.parametrize("key", ["addition_embed_type", "encoder_hid_dim_type", "class_embed_type"])
def test_conditioning_that_is_not_carried_yet_is_refused(key):
    with pytest.raises(UnsupportedError, match=f"{key}='text'"):
        FAMILY.build(TINY_CONDITION_UNET | {key: "text"})


def test_a_width_that_differs_by_block_is_refused():
    with pytest.raises(UnsupportedError, match="differs by block"):
        FAMILY.inputs(TINY_CONDITION_UNET | {"cross_attention_dim": [12, 24]})


def test_empty_added_conditions_of_a_pipeline_are_nothing():
    given = FAMILY.bind(TINY_CONDITION_UNET, (1, 2), {"encoder_hidden_states": 3, "added_cond_kwargs": {}, "timestep_cond": None})
    assert given == {"sample": 1, "timestep": 2, "encoder_hidden_states": 3}


def test_random_tokens_have_the_model_width():
    assert FAMILY.random_conditioning(TINY_CONDITION_UNET, 2, torch.Generator())["encoder_hidden_states"].shape == (2, 77, 12)
