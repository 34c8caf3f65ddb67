import pytest
import torch

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.serving.conditioning import Conditioning
from edm_deploy.serving.interface import ImageRequest
from tests.conftest import TINY, VARIANTS, tiny_model


def conditioning_of(kind, home=None):
    """The conditioning of a tiny model without an engine."""
    family, config, _ = tiny_model(kind)
    sizes = {"dtype": "fp32", "weight_storage": "int8", "outputs": ("prediction",), "sites": {}, "num_train_timesteps": 1000}
    manifest = Manifest(
        kind="engine",
        artifact="0" * 64,
        scheme="W4A4",
        family=(TINY | VARIANTS)[kind][0],
        config=config,
        inputs=family.inputs(config),
        **sizes,
    )
    return Conditioning(manifest, family_named(manifest.family), home, torch.device("cpu"))


def rows(conditioning, request, seed=0):
    encoded = conditioning.encode(request, conditioning.config)
    return conditioning.rows_of(encoded, request, torch.Generator().manual_seed(seed))


def test_a_label_is_that_of_the_request_or_is_drawn_from_the_seed():
    conditioning = conditioning_of("unet2d-classes")
    assert conditioning.classes == 5
    (row,) = rows(conditioning, ImageRequest(id="a", label=3))
    assert row["class_labels"].tolist() == [3]
    drawn = [rows(conditioning, ImageRequest(id="a"), seed)[0]["class_labels"].item() for seed in range(20)]
    assert set(drawn) <= set(range(5)) and len(set(drawn)) > 1
    assert drawn == [rows(conditioning, ImageRequest(id="a"), seed)[0]["class_labels"].item() for seed in range(20)]
    with pytest.raises(InputError, match="label 5: this model has classes 0 to 4"):
        conditioning.check(ImageRequest(id="a", label=5))


def test_a_guided_label_has_a_row_for_no_class_first():
    conditioning = conditioning_of("dit")
    none, label = rows(conditioning, ImageRequest(id="a", label=7, guidance=4.0))
    assert (none["class_labels"].item(), label["class_labels"].item()) == (1000, 7)
    assert len(rows(conditioning, ImageRequest(id="a", label=7, guidance=1.0))) == 1


def test_a_prompt_is_encoded_as_the_pipeline_encodes_it(text_model):
    conditioning = text_model.conditioning
    request = ImageRequest(id="a", prompt="a cat", negative_prompt="a dog", guidance=3.0)
    unconditional, conditional = rows(conditioning, request)
    (expected,) = rows(conditioning, ImageRequest(id="a", prompt="a dog", guidance=1.0))
    assert torch.equal(unconditional["encoder_hidden_states"], expected["encoder_hidden_states"])
    assert not torch.equal(unconditional["encoder_hidden_states"], conditional["encoder_hidden_states"])


REFUSED = {
    "none": (ImageRequest(id="a"), "samples images from a prompt. Add a prompt"),
    "long": (ImageRequest(id="a", prompt="a" * 100), "has 102 tokens; the text encoder takes 77. Shorten it"),
    "negative": (ImageRequest(id="a", prompt="a", negative_prompt="b", guidance=1.0), "negative_prompt needs classifier-free guidance"),
    "label": (ImageRequest(id="a", prompt="a", label=1), "takes no class"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_text_model_refuses(text_model, what):
    with pytest.raises(InputError, match=REFUSED[what][1]):
        text_model.conditioning.check(REFUSED[what][0])


def test_a_model_whose_inputs_no_request_has_is_refused():
    with pytest.raises(UnsupportedError, match=r"its pipeline has no text encoders\. Name a pipeline that has them with --source"):
        conditioning_of("unet2d-condition")
    with pytest.raises(UnsupportedError, match=r"has no text encoders|as further channels"):
        conditioning_of("inpainting")


def test_inputs_beside_text_and_labels_follow_the_size():
    """FLUX's and SDXL's inputs of the size are in `random_conditioning`; of a UNet without conditioning there are none."""
    assert rows(conditioning_of("unet2d"), ImageRequest(id="a")) == [{}]
    family, config, _ = tiny_model("sdxl")
    drawn = [family.random_conditioning(config, 1, torch.Generator().manual_seed(seed))["time_ids"] for seed in (0, 1)]
    assert torch.equal(*drawn)
