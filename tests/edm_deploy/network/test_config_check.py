import pytest

from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.config_check import check_config, check_schedule
from tests.conftest import SCHEDULER, TINY, TINY_CONDITION_UNET, TINY_DIT, TINY_FLUX, TINY_UNET, VARIANTS

THREE_LEVELS = {"block_out_channels": [8, 16, 16], "down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}


def check(family, config):
    check_config(family_named(family), family_named(family).full_config(config))


@pytest.mark.parametrize("kind", TINY | VARIANTS)
def test_the_config_of_a_supported_model_passes(kind):
    check(*(TINY | VARIANTS)[kind])


@pytest.mark.parametrize(
    "change",
    [
        {"resnet_time_scale_shift": "scale_shift"},
        {"downsample_type": "resnet", "upsample_type": "resnet"},
        {"attn_norm_num_groups": 2},
        {"sample_size": [8, 12]},
        {"center_input_sample": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_an_unusual_unet_passes(change):
    check("unet2d", TINY_UNET | change)


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("unet2d", TINY_UNET | {"in_channels": 6}, "in_channels=6 and out_channels=3: expected equal"),
        ("unet2d", TINY_UNET | {"out_channels": 6}, "in_channels=3 and out_channels=6: expected equal.*learned variance"),
        ("unet2d-condition", TINY_CONDITION_UNET | {"out_channels": 8}, "in_channels=4 and out_channels=8: expected as many input"),
        ("unet2d-condition", TINY_CONDITION_UNET | {"dual_cross_attention": True}, "dual_cross_attention=True: two texts"),
        ("unet2d-condition", TINY_CONDITION_UNET | {"class_embeddings_concat": True}, "does not run in diffusers: a and b must have"),
        ("unet2d", TINY_UNET | {"sample_size": None}, "UNet2DModel with sample_size=None: expected one positive number"),
        ("unet2d-condition", TINY_CONDITION_UNET | {"sample_size": None}, "UNet2DConditionModel with sample_size=None"),
        ("dit-transformer-2d", TINY_DIT | {"sample_size": 7}, "sample_size=7: expected .* multiples of 2"),
        ("unet2d", TINY_UNET | {"sample_size": "8"}, "sample_size='8'"),
        ("unet2d", TINY_UNET | {"sample_size": 0}, "sample_size=0"),
        ("unet2d", TINY_UNET | {"sample_size": -8}, "sample_size=-8"),
        ("unet2d", TINY_UNET | {"sample_size": [8, 8, 8]}, r"sample_size=\[8, 8, 8\]"),
        ("unet2d", TINY_UNET | {"sample_size": 7}, "sample_size=7: expected height and width that are multiples of 2"),
        ("unet2d", TINY_UNET | THREE_LEVELS | {"sample_size": 6}, "multiples of 4"),
        ("unet2d-condition", TINY_CONDITION_UNET | {"sample_size": [8, 7]}, r"sample_size=\[8, 7\]: expected .* multiples of 2"),
        ("dit-transformer-2d", TINY_DIT | {"out_channels": 2}, r"predicts \[2, 8, 8\] for a sample of \[4, 8, 8\]"),
        ("flux-transformer-2d", TINY_FLUX | {"sample_size": 7}, "sample_size=7: expected .* multiples of 2"),
    ],
)
def test_a_config_that_cannot_be_sampled_is_refused_with_the_reason(family, config, message):
    with pytest.raises(UnsupportedError, match=message):
        check(family, config)


def test_a_learned_table_of_timesteps_is_as_long_as_the_schedule():
    family = family_named("unet2d")
    config = family.full_config(TINY_UNET | {"time_embedding_type": "learned", "num_train_timesteps": 10})
    check_schedule(family, config, SCHEDULER | {"num_train_timesteps": 10})
    with pytest.raises(UnsupportedError, match="embeddings of 10 timesteps, but its scheduler has 1000"):
        check_schedule(family, config, SCHEDULER)


def test_a_full_config_has_the_defaults_of_diffusers_and_reads_as_json():
    config = family_named("unet2d").full_config(TINY_UNET | {"_class_name": "UNet2DModel", "block_out_channels": (8, 16)})
    assert config["flip_sin_to_cos"] is True
    assert config["block_out_channels"] == [8, 16]
    assert "_class_name" not in config


@pytest.mark.parametrize("kind", TINY | VARIANTS)
def test_a_full_config_is_what_diffusers_stores_with_the_model(kind):
    name, config = (TINY | VARIANTS)[kind]
    family = family_named(name)
    stored = {key: list(value) if isinstance(value, tuple) else value for key, value in family.build(config).config.items()}
    assert family.full_config(config) == {key: value for key, value in stored.items() if not key.startswith("_")}
