from __future__ import annotations

import pytest
import torch

from edm_deploy import load_pipeline
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest, PipelineArguments, cycle

GENERATOR = torch.Generator()


@pytest.fixture(scope="module")
def prompted_pipe(prompted):
    return load_pipeline(prompted.engine)


@pytest.fixture(scope="module")
def pixels(chain):
    return load_pipeline(chain.engine)


def arguments_of(pipe, **request):
    return PipelineArguments(pipe, pipe.unet, GenerationRequest(**request))


def test_prompts_are_assigned_cyclically():
    assert cycle("abc", 2, 3) == ["c", "a", "b"]


def test_a_guided_image_takes_two_samples_of_the_engines_batch(prompted_pipe):
    guided, unguided = (arguments_of(prompted_pipe, prompts=("a cat",), guidance=scale) for scale in (None, 1.0))
    assert (guided.scale, guided.samples_per_image, unguided.samples_per_image) == (7.5, 2, 1)
    assert guided.images_at_once(ShapeRange(1, 4, 6)) == ShapeRange(1, 3, 3)
    assert guided.images_at_once(ShapeRange(3, 4, 6)) == ShapeRange(2, 3, 3)
    assert unguided.images_at_once(ShapeRange(1, 4, 6)) == ShapeRange(1, 6, 6)
    with pytest.raises(InputError, match=r"Guidance 7\.5 takes two samples an image; the engine's batch is 1\. Build it again"):
        guided.images_at_once(ShapeRange(1, 1, 1))


def test_keywords_are_those_of_the_pipeline(prompted_pipe):
    arguments = arguments_of(prompted_pipe, prompts=("a", "b"), negative_prompt="c", guidance=2.0, height=32)
    expected = {"prompt": ["b", "a"], "negative_prompt": ["c", "c"], "guidance_scale": 2.0, "height": 32, "width": 32}
    assert arguments.keywords(1, 2, GENERATOR) == expected


def test_a_truncated_prompt_gives_a_note(prompted_pipe):
    assert arguments_of(prompted_pipe, prompts=("a cat",)).notes() == []
    (note,) = arguments_of(prompted_pipe, prompts=("a" * 100,)).notes()
    assert "has 102 tokens; the text encoder reads the first 77" in note


REFUSED_OF_TEXT = {
    "no prompt": ({}, r"samples images from a prompt\. Add --prompt"),
    "a class": ({"prompts": ("a",), "labels": (3,)}, r"--class-label: a StableDiffusionPipeline .* takes no class"),
    "a negative guidance": ({"prompts": ("a",), "guidance": -1.0}, "--guidance -1: expected 0 or more"),
    "a negative prompt unguided": (
        {"prompts": ("a",), "negative_prompt": "b", "guidance": 1.0},
        "--negative-prompt needs classifier-free guidance",
    ),
    "a size between the levels": ({"prompts": ("a",), "height": 30}, "--height 30: expected a multiple of 4 pixels"),
}
REFUSED_OF_PIXELS = {
    "a prompt": ({"prompts": ("a cat",)}, r"--prompt: a UnconditionalPipeline takes no text\. Leave"),
    "a class": ({"labels": (3,)}, "--class-label: a UnconditionalPipeline of a UNet2DModel takes no class"),
    "guidance": ({"guidance": 3.0}, "--guidance: this UNet2DModel is not guided"),
    "a size": ({"width": 16}, "--width: a UnconditionalPipeline samples images of a fixed size"),
}


@pytest.mark.parametrize("case", REFUSED_OF_TEXT)
def test_a_text_pipeline_refuses_what_it_does_not_take(prompted_pipe, case):
    request, message = REFUSED_OF_TEXT[case]
    with pytest.raises(InputError, match=message):
        arguments_of(prompted_pipe, **request)


@pytest.mark.parametrize("case", REFUSED_OF_PIXELS)
def test_a_pixel_pipeline_refuses_what_it_does_not_take(pixels, case):
    request, message = REFUSED_OF_PIXELS[case]
    with pytest.raises(InputError, match=message):
        arguments_of(pixels, **request)


def test_a_label_out_of_range_is_refused(pixels, monkeypatch):
    monkeypatch.setattr(type(pixels.unet.family), "classes", lambda self, config: 5)
    assert arguments_of(pixels, labels=(4,)).keywords(0, 2, GENERATOR)["class_labels"].tolist() == [4, 4]
    with pytest.raises(InputError, match="--class-label 5: this model has classes 0 to 4"):
        arguments_of(pixels, labels=(5,))
    with pytest.raises(InputError, match=r"takes no text\. Choose a class with --class-label"):
        arguments_of(pixels, prompts=("a cat",))


def test_a_pipeline_without_text_encoders_is_refused_with_the_option_that_names_one(prompted):
    pipe = load_pipeline(prompted.engine)
    pipe.text_encoder = None
    with pytest.raises(UnsupportedError, match=r"without text encoders, .* --source"):
        arguments_of(pipe, prompts=("a cat",))


def test_a_pipeline_that_starts_from_images_is_refused_with_the_python_call(prompted_pipe):
    from diffusers import StableDiffusionInpaintPipeline

    inpainting = StableDiffusionInpaintPipeline(**prompted_pipe.components, requires_safety_checker=False)
    with pytest.raises(
        UnsupportedError, match=r"starts from images \(image, mask_image\), .*load_pipeline\(\.\.\.\)\(prompt=\.\.\., image="
    ):
        arguments_of(inpainting, prompts=("a cat",))
