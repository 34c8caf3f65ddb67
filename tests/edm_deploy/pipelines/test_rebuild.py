import shutil

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline

from edm_deploy import load_pipeline
from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.pipelines.decoding import decoder_of
from edm_deploy.pipelines.rebuild import text_pipeline
from edm_deploy.pipelines.source import float_artifact, load_source
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.storage.directories import copy_components, read_json
from engines import build_engine
from tests.tiny_pipelines import saved, stable_diffusion


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd")
    onnx_from_artifact(float_artifact(load_source(saved(folder / "p"))), folder / "onnx")
    sizes = {"batch": ShapeRange(1, 2, 4), "height": ShapeRange(8, 8, 16), "width": ShapeRange(8, 8, 16)}
    build_engine(folder / "onnx", folder / "engine", backend="ort", options=BuildOptions(profile=sizes))
    return folder / "engine"


@pytest.mark.parametrize("size", [16, 32])
def test_a_pipeline_around_a_float_engine_is_the_original(engine, size):
    """float32 both: they differ in the order of summation, 1e-6 a step."""
    found, expected = (
        pipe(
            "a cat", num_inference_steps=4, generator=torch.Generator().manual_seed(0), output_type="latent", height=size, width=size
        ).images
        for pipe in (load_pipeline(engine), stable_diffusion())
    )
    assert float((found - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("steps", [0, -1])
def test_a_pipeline_around_an_engine_takes_one_step_or_more(engine, steps):
    """Of diffusers' own, 0 steps are a ZeroDivisionError, and -1 the decoded noise."""
    pipe = load_pipeline(engine)
    assert type(pipe) is StableDiffusionPipeline and type(pipe.scheduler) is PNDMScheduler
    for arguments in ({"num_inference_steps": steps}, {"args": (16, 16, steps)}):
        with pytest.raises(InputError, match=rf"{steps} inference steps: expected 1 or more\. Pass another num_inference_steps"):
            pipe("a cat", *arguments.pop("args", ()), **arguments)


def test_the_engine_serves_other_pipelines_of_the_same_components(engine):
    pipe = load_pipeline(engine, scheduler="unipc")
    image = torch.rand(1, 3, 16, 16)
    made = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)("a dog", image=image, num_inference_steps=4)
    assert made.images[0].size == (16, 16)


def test_components_that_are_gone_are_named(engine, tmp_path):
    copied = shutil.copytree(engine, tmp_path / "engine")
    with pytest.raises(UnsupportedError, match=r"has no 'vae'|has no 'text_encoder'"):
        load_pipeline(copied, source=engine)


def test_an_image_processor_without_torchvision_is_no_news():
    import logging

    logger = logging.getLogger("transformers.utils.import_utils")

    def passes(text):
        return logger.filter(logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None))

    assert not passes("`CLIPImageProcessor` requires torchvision (not installed); falling back to `CLIPImageProcessorPil` for ...")
    assert passes("another thing that went wrong")


def test_components_with_one_variant_only_are_loaded_and_copied(tmp_path):
    home, copied = tmp_path / "saved", tmp_path / "copied"
    stable_diffusion().save_pretrained(home, variant="fp16")
    index = read_json(home / "model_index.json", what="pipeline")
    assert text_pipeline(home).text_encoder.dtype == torch.float32
    assert decoder_of(load_source(home)).kind == "decoded"
    copy_components(index, "unet", home, copied)
    assert {path.name for path in copied.glob("*/*.safetensors")} == {"model.fp16.safetensors", "diffusion_pytorch_model.fp16.safetensors"}
