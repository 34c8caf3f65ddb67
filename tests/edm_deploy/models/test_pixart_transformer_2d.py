import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtSigmaPipeline

from edm_deploy import load_pipeline
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.models import family_named
from edm_deploy.pipelines.prompt_encoding import conditioner_of
from edm_deploy.pipelines.schedulers import schedulers_for
from edm_deploy.pipelines.source import float_artifact, load_source
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import ShapeRange
from engines import build_engine
from tests.conftest import SCHEDULER, TINY, tiny_model
from tests.edm_deploy.models.chain import (
    FLOAT_TOLERANCE,
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
    check_float_engine("pixart")


def test_the_quantized_engine_is_the_reference():
    check_quantized_engine("pixart")


@pytest.mark.parametrize("size", [{}, {"height": 64, "width": 128}], ids=["own-size", "wider"])
@pytest.mark.parametrize("scheduler", [None, *schedulers_for(SCHEDULER)])
def test_its_pipeline_comes_back_with_every_scheduler(scheduler, size):
    check_pipeline("pixart", scheduler, prompt=list(PROMPTS), **size, use_resolution_binning=False, output_type="latent")


def test_the_other_components_are_reloaded_unchanged():
    check_components("pixart")


@torch.no_grad()
def test_prompts_are_encoded_as_by_the_pipeline():
    given, mask, without, without_mask = chain("pixart").original.encode_prompt(list(PROMPTS))
    check_prompts("pixart", (given, mask), (without, without_mask))


def test_a_prompt_that_the_pipeline_would_cut_is_refused_though_the_tokenizer_takes_it():
    assert chain("pixart").original.tokenizer.model_max_length > 130
    with pytest.raises(InputError, match=r"The prompt 'aaaa.*' has 132 tokens; the text encoder takes 120\. Shorten it"):
        conditioner_of(chain("pixart").source, prompts=("a" * 130,))


@torch.no_grad()
def test_sigma_takes_as_many_tokens_as_its_pipeline():
    sigma = PixArtSigmaPipeline(**chain("pixart").original.components)
    family, config, _ = tiny_model("pixart")
    given, without = family.encode_prompts(config, sigma, PROMPTS)
    assert given["encoder_hidden_states"].shape == (2, 300, 12)
    torch.testing.assert_close(given["encoder_hidden_states"], sigma.encode_prompt(list(PROMPTS))[0])
    assert without["encoder_attention_mask"].shape == (1, 300)


def test_the_model_of_1024_pixels_is_conditioned_on_the_image_size(tmp_path):
    """diffusers' pipeline tells it where the model's own size is 128 latents; smaller images of it take less time."""
    parts = chain("pixart").original.components
    torch.manual_seed(0)
    family, config = family_named(TINY["pixart-1024"][0]), TINY["pixart-1024"][1] | {"sample_size": 128}
    original = PixArtAlphaPipeline(**parts | {"transformer": family.model_class.from_config(config).eval()})
    original.set_progress_bar_config(disable=True)
    original.save_pretrained(tmp_path / "p")
    onnx_from_artifact(float_artifact(load_source(tmp_path / "p")), tmp_path / "onnx")
    sizes = {"batch": ShapeRange(1, 2, 2), "height": ShapeRange(8, 8, 16), "width": ShapeRange(8, 8, 16)}
    build_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort", options=BuildOptions(profile=sizes))
    pipeline = load_pipeline(tmp_path / "engine")
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"height": 64, "width": 128, "use_resolution_binning": False, "output_type": "latent", "num_inference_steps": 2}
    found, expected = (made(PROMPTS[0], **arguments, generator=torch.Generator().manual_seed(0)).images for made in (pipeline, original))
    torch.testing.assert_close(found, expected, rtol=0, atol=FLOAT_TOLERANCE * max(1.0, float(expected.square().mean().sqrt())))


def test_layers_whose_rows_are_not_the_samples_stay_float():
    family, _, model = tiny_model("pixart-1024")
    rule = family.rule("adaln_single.emb.resolution_embedder.linear_1")
    assert rule.placement == "float" and "two sizes per sample" in rule.reason
    assert not any("resolution" in name for name in family.sites(model))
    assert family.placement("adaln_single.linear") == "w8a8"


def test_misuse_is_one_clear_error():
    denoiser = chain("pixart").denoiser
    with pytest.raises(InputError, match="tokens 513 lies outside the engine's profile 1:8:512"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1, 513, 12), 1, encoder_attention_mask=torch.ones(1, 513))
    with pytest.raises(InputError, match="encoder_attention_mask has tokens 4, another input has 5"):
        denoiser(torch.zeros(1, 4, 8, 8), torch.zeros(1, 5, 12), 1, encoder_attention_mask=torch.ones(1, 4))
    with pytest.raises(UnsupportedError, match="GLIGEN"):
        tiny_model("pixart")[0].build(tiny_model("pixart")[1] | {"attention_type": "gated"})
