from __future__ import annotations

import diffusers
import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy_tools.inspection.architectures import architecture, names, with_layers

ROUNDED = {"ldm4-imagenet": 1e-5}  # published as 400.92 M; the others to the last parameter


def count(name: str) -> int:
    described = architecture(name)
    with torch.device("meta"):
        model = getattr(diffusers, described.class_name).from_config(dict(described.config))
    return sum(value.numel() for value in model.parameters())


@pytest.mark.parametrize("name", [name for name in names() if name != "dit-xl-2-256"])
def test_an_architecture_has_as_many_parameters_as_published(name):
    assert count(name) == pytest.approx(architecture(name).parameters, rel=ROUNDED.get(name, 0), abs=0)


def test_dit_has_as_many_as_published_but_for_27_copies_of_its_embedding():
    timestep = (256 + 1) * 1152 + (1152 + 1) * 1152
    labels = 1001 * 1152
    position = 256 * 1152  # a parameter in the authors' code, though not trained; a buffer in diffusers
    assert count("dit-xl-2-256") - 27 * (timestep + labels) + position == pytest.approx(architecture("dit-xl-2-256").parameters, rel=2e-4)


def test_the_config_is_whole_and_reads_as_json():
    config = architecture("sd15").config
    assert config["norm_num_groups"] == 32  # diffusers' default
    assert config["down_block_types"][-1] == "DownBlock2D"
    assert "self" not in config


@pytest.mark.parametrize("name", names())
def test_pipeline_and_scheduler_are_of_diffusers(name):
    described = architecture(name)
    assert hasattr(diffusers, described.pipeline_class)
    scheduler = getattr(diffusers, described.scheduler_class).from_config(dict(described.scheduler_config))
    assert scheduler.config.num_train_timesteps == 1000
    assert set(described.scheduler_config) <= set(scheduler.config)


def test_an_unknown_architecture_is_refused_with_the_nearest():
    with pytest.raises(UnsupportedError, match="Did you mean 'sd15'"):
        architecture("sd1.5")


@pytest.mark.parametrize("name", ["flux1-schnell", "sd3-medium", "pixart-alpha-512", "dit-xl-2-256"])
def test_fewer_blocks_have_the_real_width(name):
    whole = architecture(name)
    short = with_layers(whole, 1)
    assert short.config["num_layers"] == 1
    assert {key: value for key, value in short.config.items() if key not in ("num_layers", "num_single_layers")} == {
        key: value for key, value in whole.config.items() if key not in ("num_layers", "num_single_layers")
    }
    assert short.parameters < whole.parameters / 10


def test_blocks_that_are_left_out_are_not_named_either():
    chosen = architecture("sd3-medium")
    chosen = chosen.__class__(**vars(chosen) | {"config": dict(chosen.config) | {"dual_attention_layers": [0, 1, 2]}})
    assert with_layers(chosen, 2).config["dual_attention_layers"] == [0, 1]


def test_a_depth_that_cannot_be_is_refused():
    with pytest.raises(InputError, match=r"--layers 2: Stable Diffusion 1\.5 is no stack of equal blocks"):
        with_layers(architecture("sd15"), 2)
    with pytest.raises(InputError, match=r"--layers 0: FLUX\.1-schnell has 19 and 38 blocks"):
        with_layers(architecture("flux1-schnell"), 0)
