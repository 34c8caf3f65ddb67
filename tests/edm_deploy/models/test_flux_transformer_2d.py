import copy

import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines.prompt_encoding import conditioner_of
from edm_deploy.pipelines.sampling import set_steps
from tests.conftest import tiny_model
from tests.edm_deploy.models.chain import (
    PROMPTS,
    chain,
    check_components,
    check_float_engine,
    check_pipeline,
    check_prompts,
    check_quantized_engine,
)

pytest.importorskip("onnxruntime")


def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps():
    check_float_engine("flux")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("flux")


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("kind", "scheduler", "settings"),
    [
        ("flux", None, {}),  # shifted by the size of the image, as dev is
        ("flux", "flow-euler", {"use_dynamic_shifting": False}),
        pytest.param("flux-schnell", None, {}, marks=pytest.mark.extended),
        pytest.param("flux-schnell", "flow-euler", {"use_dynamic_shifting": True}, marks=pytest.mark.extended),
    ],
)
def test_its_pipeline_comes_back(kind, scheduler, settings, size):
    check_pipeline(kind, scheduler, settings, prompt=list(PROMPTS), height=64, width=size, output_type="latent")


@pytest.mark.parametrize("kind", ["flux", pytest.param("flux-schnell", marks=pytest.mark.extended)])
def test_the_other_components_are_reloaded_unchanged(kind):
    check_components(kind)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["flux", pytest.param("flux-schnell", marks=pytest.mark.extended)])
def test_prompts_are_encoded_as_by_the_pipeline(kind):
    given, pooled, _ = chain(kind).original.encode_prompt(list(PROMPTS), None)
    check_prompts(kind, (given, pooled), ())


def test_a_prompt_that_is_longer_than_the_second_text_encoder_takes_is_refused():
    assert conditioner_of(chain("flux").source, prompts=("a" * 200,)).origin.startswith("1 prompts")  # CLIP is meant to see less
    with pytest.raises(InputError, match=r"has 602 tokens; the text encoder takes 512"):
        conditioner_of(chain("flux").source, prompts=("a" * 600,))


@pytest.mark.extended  # an engine of its own; the levels are in tests/calibration/data/test_noise_schedules.py
def test_rows_are_calibrated_where_its_pipeline_stops():
    """The scheduler alone would space three steps from 1 to 0.001: rows that no sample ever meets."""
    made = chain("flux-schnell")
    made.original(PROMPTS[0], num_inference_steps=3, height=64, width=64, output_type="latent")
    scheduler = copy.deepcopy(made.source.scheduler)
    set_steps(scheduler, 3, made.source.family_object.sigmas(3))
    torch.testing.assert_close(scheduler.timesteps, made.original.scheduler.timesteps)
    assert made.artifact.timesteps.tolist() == [333, 667, 999]  # 1000 takes the last row


def test_building_it_says_nothing(capfd):
    family, config, _ = tiny_model("flux")
    assert family.build(config).config.sample_size == 8
    assert "sample_size" not in capfd.readouterr().err


def test_timesteps_of_the_graph_are_those_of_the_schedule():
    family, config, _ = tiny_model("flux")
    ids = torch.zeros(16, 3)
    given = {"hidden_states": torch.zeros(2, 16, 16), "encoder_hidden_states": torch.zeros(2, 5, 12)}
    given |= {"pooled_projections": torch.zeros(2, 16), "guidance": torch.ones(2), "img_ids": ids, "txt_ids": torch.zeros(5, 3)}
    bound = family.bind(config, (), given | {"timestep": torch.tensor([1.0, 0.25]), "joint_attention_kwargs": {}})
    assert bound["timestep"].tolist() == [1000.0, 250.0]
    assert bound["img_ids"].shape == (2, 16, 3)
    with pytest.raises(UnsupportedError, match="no input 'controlnet_block_samples'"):
        family.bind(config, (), given | {"timestep": 1.0, "controlnet_block_samples": [ids]})


def test_guidance_is_embedded_in_dev_and_absent_in_schnell():
    for kind, expected in (("flux", "embedded"), ("flux-schnell", "none")):
        family, config, _ = tiny_model(kind)
        assert family.guidance(config).kind == expected
        assert ("guidance" in {declared.name for declared in family.inputs(config)}) == (kind == "flux")


def test_another_number_of_image_tokens_than_the_profile_is_refused():
    inputs = {"sample": torch.zeros(1, 100, 16), "timestep": torch.zeros(1)}
    inputs |= {"encoder_hidden_states": torch.zeros(1, 5, 12), "pooled_projections": torch.zeros(1, 16), "guidance": torch.ones(1)}
    with pytest.raises(
        InputError, match=r"image_tokens 100 is outside the engine's profile 16:16:64\..* build again with --image-tokens 16:16:100"
    ):
        chain("flux").denoiser.run(inputs | {"img_ids": torch.zeros(1, 100, 3), "txt_ids": torch.zeros(1, 5, 3)})


def test_packed_latents_are_unpacked_as_the_pipeline_unpacks_them():
    from diffusers import FluxPipeline

    family, config, _ = tiny_model("flux")
    config = config | {"sample_size": [8, 12]}
    sample = torch.arange(2 * 24 * 16).float().reshape(2, 24, 16)
    assert torch.equal(family.latents(config, sample), FluxPipeline._unpack_latents(sample, 64, 96, 8))
