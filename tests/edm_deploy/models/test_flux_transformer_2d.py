import pytest
import torch
from diffusers import FluxPipeline

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines import scheduler_named
from tests.conftest import FLOW_SCHEDULER, tiny_model
from tests.edm_deploy.models.chain import chain, check_float_engine, check_pipeline, check_quantized_engine, tiny_vae

pytest.importorskip("onnxruntime")


def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps():
    check_float_engine("flux")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("flux")


@pytest.mark.parametrize("settings", [{}, {"use_dynamic_shifting": True}], ids=["fixed-shift", "dynamic-shift"])
def test_it_drops_into_its_pipeline(settings):
    generator = torch.Generator().manual_seed(1)
    pipeline = FluxPipeline(
        scheduler_named("flow-euler", FLOW_SCHEDULER | settings), tiny_vae(4), None, None, None, None, chain("flux").model
    )
    check_pipeline(
        pipeline,
        "flux",
        prompt_embeds=torch.randn(2, 9, 12, generator=generator),
        pooled_prompt_embeds=torch.randn(2, 16, generator=generator),
        height=64,
        width=128,
        output_type="latent",
    )


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
    with pytest.raises(InputError, match="image_tokens 100 lies outside the engine's profile 16:16:64"):
        chain("flux").exact.run(inputs | {"img_ids": torch.zeros(1, 100, 3), "txt_ids": torch.zeros(1, 5, 3)})


def test_packed_latents_are_unpacked_as_the_pipeline_unpacks_them():
    from diffusers import FluxPipeline

    family, config, _ = tiny_model("flux")
    config = config | {"sample_size": [8, 12]}
    sample = torch.arange(2 * 24 * 16).float().reshape(2, 24, 16)
    assert torch.equal(family.latents(config, sample), FluxPipeline._unpack_latents(sample, 64, 96, 8))
