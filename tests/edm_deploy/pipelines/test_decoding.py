from __future__ import annotations

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from edm_deploy.errors import ArtifactError
from edm_deploy.pipelines.decoding import Decoder, decoder_of
from edm_deploy.pipelines.source import load_source
from tests.conftest import tiny_model
from tests.tiny_pipelines import saved

FAMILY, CONFIG, _ = tiny_model("unet2d")
PIXELS = Decoder(kind="pixels", family=FAMILY, config=CONFIG)
LATENTS = Decoder(kind="latents", family=FAMILY, config=CONFIG)


def test_psnr_of_images_counts_a_range_of_two_and_clamps():
    # Everywhere 0.2 apart: -10 log10(0.04 / 4) = 20 dB. What lies beyond 1 is 1.
    assert PIXELS.psnr(torch.full((1, 4), 0.2), torch.zeros(1, 4)) == pytest.approx(20.0, abs=1e-5)
    assert PIXELS.psnr(torch.full((1, 4), 7.0), torch.ones(1, 4)) > 120


def test_psnr_of_latents_counts_the_range_that_is_there():
    # From -5 to 5, everywhere 1 apart: 10 log10(100 / 1) = 20 dB, and nothing is clamped.
    expected = torch.tensor([[-5.0, 5.0]])
    assert LATENTS.psnr(expected + 1, expected) == pytest.approx(20.0, abs=1e-5)


def test_latents_are_spread_to_be_looked_at():
    latents = torch.tensor([-5.0, 5.0, 0.0, 2.5]).reshape(1, 1, 2, 2)
    assert LATENTS.visible(latents, latents).flatten().tolist() == [-1, 1, 0, 0.5]
    assert torch.equal(PIXELS.visible(latents, latents), latents)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_source(saved(tmp_path_factory.mktemp("decoding") / "p"))


def test_latents_are_decoded_as_the_pipeline_decodes_them(source):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(source.directory)
    pipe.set_progress_bar_config(disable=True)
    options = {"prompt": "a cat", "num_inference_steps": 1, "height": 16, "width": 16}
    latents, expected = (pipe(**options, generator=torch.Generator().manual_seed(0), output_type=kind).images for kind in ("latent", "pt"))
    decoder = decoder_of(source)
    assert decoder.kind == "decoded"
    torch.testing.assert_close((decoder.images(latents) / 2 + 0.5).clamp(0, 1), expected, atol=1e-5, rtol=0)


def test_a_vae_shifts_and_spreads_as_its_config_says():
    shown = []

    def decoder(**config):
        vae = SimpleNamespace(config=config, decode=lambda one: SimpleNamespace(sample=shown.append(one) or one))
        return Decoder(kind="decoded", family=FAMILY, config=CONFIG, vae=vae)

    sample = torch.full((1, 1, 1, 1), 2.0)
    assert decoder(scaling_factor=0.5, shift_factor=0.25).images(sample).item() == 4.25
    assert decoder(scaling_factor=0.5, latents_mean=[1.0], latents_std=[3.0]).images(sample).item() == 13.0


def test_without_its_vae_latents_are_compared(source, tmp_path):
    assert decoder_of(replace(source, directory=tmp_path)).kind == "latents"


def test_a_broken_vae_is_one_line(source, tmp_path):
    shutil.copytree(source.directory / "vae", tmp_path / "vae")
    next((tmp_path / "vae").glob("*.safetensors")).write_bytes(b"broken")
    with pytest.raises(ArtifactError, match="vae cannot be read as AutoencoderKL"):
        decoder_of(replace(source, directory=tmp_path))
