import pytest
import torch

from edm_deploy.errors import InputError
from edm_deploy.pipelines.prompt_encoding import conditioner_of
from edm_deploy.pipelines.source import load_source
from tests.calibration.tiny import tiny_source
from tests.tiny_pipelines import saved, stable_diffusion


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return load_source(saved(tmp_path_factory.mktemp("sd") / "p"))


def test_prompts_are_encoded_as_by_the_pipeline(source):
    conditioner = conditioner_of(source, prompts=("a cat", "a dog"))
    given, without = stable_diffusion().encode_prompt("a dog", "cpu", 1, True)
    torch.testing.assert_close(conditioner.encoded["encoder_hidden_states"][1:], given)
    torch.testing.assert_close(conditioner.unconditional["encoder_hidden_states"], without)
    assert conditioner.scale == 7.5
    assert conditioner.origin.startswith("2 prompts")


def test_a_prompt_that_is_cut_off_is_refused(source):
    with pytest.raises(InputError, match=r"has 102 tokens; the text encoder takes 77\. Shorten it"):
        conditioner_of(source, prompts=("a" * 100,))


def test_without_text_encoders_conditioning_is_random_and_a_warning_says_so(monkeypatch):
    said = []
    monkeypatch.setattr("edm_deploy.pipelines.prompt_encoding.log.warning", lambda text, *values: said.append(text % values))
    conditioner = conditioner_of(tiny_source("unet2d-condition"))
    assert said == ["unet2d-condition has no text encoders here: random encoder_hidden_states replace those of prompts."]
    assert conditioner.origin == "drawn at random"
