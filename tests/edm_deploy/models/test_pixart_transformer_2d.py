import pytest
import torch
from diffusers import PixArtAlphaPipeline

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.pipelines import scheduler_named, schedulers_for
from tests.conftest import SCHEDULER, tiny_model
from tests.edm_deploy.models.chain import chain, check_float_engine, check_pipeline, check_quantized_engine, tiny_vae

pytest.importorskip("onnxruntime")


def test_the_float_engine_is_the_model_at_two_resolutions_and_mixed_timesteps():
    check_float_engine("pixart")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("pixart")


@pytest.mark.parametrize("scheduler", schedulers_for(SCHEDULER))
def test_it_drops_into_its_pipeline_with_every_scheduler(scheduler):
    generator = torch.Generator().manual_seed(1)
    pipeline = PixArtAlphaPipeline(None, None, tiny_vae(), chain("pixart").model, scheduler_named(scheduler, SCHEDULER))
    check_pipeline(
        pipeline,
        "pixart",
        prompt=None,
        negative_prompt=None,
        prompt_embeds=torch.randn(2, 9, 12, generator=generator),
        prompt_attention_mask=torch.tensor([[1] * 5 + [0] * 4, [1] * 9]),
        negative_prompt_embeds=torch.randn(2, 9, 12, generator=generator),
        negative_prompt_attention_mask=torch.tensor([[1] + [0] * 8] * 2),
        height=64,
        width=128,
        use_resolution_binning=False,
        output_type="latent",
    )


def test_layers_whose_rows_are_not_the_samples_stay_float():
    family, _, model = tiny_model("pixart-1024")
    rule = family.rule("adaln_single.emb.resolution_embedder.linear_1")
    assert rule.placement == "float" and "two sizes a sample" in rule.reason
    assert not any("resolution" in name for name in family.sites(model))
    assert family.placement("adaln_single.linear") == "keep8"


def test_misuse_is_one_clear_error():
    denoiser = chain("pixart").exact
    with pytest.raises(InputError, match="tokens 513 lies outside the engine's profile 1:8:512"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1, 513, 12), 1, encoder_attention_mask=torch.ones(1, 513))
    with pytest.raises(InputError, match="encoder_attention_mask has tokens 4, another input has 5"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), 1, encoder_attention_mask=torch.ones(1, 4))
    with pytest.raises(UnsupportedError, match="GLIGEN"):
        tiny_model("pixart")[0].build(tiny_model("pixart")[1] | {"attention_type": "gated"})
