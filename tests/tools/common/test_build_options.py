from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edm_deploy import load_pipeline
from edm_deploy.errors import ArtifactError, InputError
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy_tools.common.build_options import build_options, pipeline_to_copy, range_of


def test_a_profile_is_three_numbers_or_one():
    assert range_of("batch", "1:8:16") == ShapeRange(1, 8, 16)
    assert range_of("batch", "4") == ShapeRange(4, 4, 4)


@pytest.mark.parametrize("text", ["1:8", "a", "1:8:", "-1", ""])
def test_a_profile_of_another_form_is_refused(text):
    with pytest.raises(InputError, match="expected MIN:OPT:MAX"):
        range_of("batch", text)


@pytest.mark.parametrize("text", ["0:16:64", "4:2:8", "1:8:4", "0", "1:16:65537"])
def test_a_profile_that_no_engine_can_have_is_refused_by_its_option(text):
    with pytest.raises(InputError, match=f"--image-tokens {text}: expected 1 <= MIN <= OPT <= MAX <= 65536, for example 1:16:32"):
        range_of("image_tokens", text)


def test_only_given_sizes_are_in_the_options():
    options = build_options({"batch": "1:2:4", "height": None}, {"gpu": "rtx3090"})
    assert options.profile == {"batch": ShapeRange(1, 2, 4)}
    assert options.gpu == "rtx3090"


@pytest.mark.parametrize("options", [{"optimization_level": 6}, {"threads": 0}, {"workspace_mib": 0}])
def test_numbers_outside_their_range_are_refused(options):
    with pytest.raises(InputError, match="expected"):
        build_options({}, options)


def test_an_engine_directory_with_its_pipeline_needs_nothing_else(prompted, tmp_path):
    """As on a machine that has nothing else: the source is gone, and there is no network."""
    gone = prompted.model.with_name("elsewhere")
    folder = Path(shutil.copytree(prompted.engine, tmp_path / "engine"))
    prompted.model.rename(gone)
    try:
        images = load_pipeline(folder)("a cat", num_inference_steps=2, output_type="np").images
    finally:
        gone.rename(prompted.model)
    assert images.shape == (1, 16, 16, 3)
    assert {"text_encoder", "tokenizer", "vae", "scheduler"} <= {path.name for path in folder.iterdir()}
    assert not (folder / "unet").exists()


def test_copied_components_are_checked_before_they_are_read(prompted, copy_of):
    folder = copy_of(prompted.engine)
    assert "vae/config.json" in Manifest.read(folder, kind="engine").files
    with (folder / "vae" / "diffusion_pytorch_model.safetensors").open("ab") as stream:
        stream.write(b"0")
    with pytest.raises(ArtifactError, match=r"vae/diffusion_pytorch_model\.safetensors does not match manifest\.json"):
        load_pipeline(folder)


def test_the_pipeline_to_copy_is_named_or_recorded(prompted, chain, copy_of, tmp_path):
    assert pipeline_to_copy(prompted.onnx, False, None) is None
    assert pipeline_to_copy(prompted.onnx, True, None) == prompted.model
    with pytest.raises(InputError, match="--source names the pipeline that --with-pipeline copies from"):
        pipeline_to_copy(prompted.onnx, False, str(prompted.model))
    with pytest.raises(ArtifactError, match=r"--with-pipeline: ./gone does not exist; .* Name the pipeline with --source MODEL"):
        pipeline_to_copy(prompted.onnx, True, "./gone")
    with pytest.raises(ArtifactError, match=r"is a DDIMPipeline, .* belongs to a StableDiffusionPipeline"):
        pipeline_to_copy(prompted.onnx, True, str(chain.model))
    nameless = copy_of(prompted.onnx)
    index = json.loads((nameless / "model_index.json").read_text())
    del index["_name_or_path"]
    (nameless / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="does not record the pipeline that it was made from"):
        pipeline_to_copy(nameless, True, None)


def test_a_pipeline_that_lacks_a_part_is_refused_before_the_build(run, prompted, copy_of, tmp_path):
    source = copy_of(prompted.model)
    shutil.rmtree(source / "text_encoder")
    ran = run("build-engine", prompted.onnx, "--out", tmp_path / "out", "--backend", "ort", "--with-pipeline", "--source", source)
    assert "has no 'text_encoder', which a StableDiffusionPipeline needs" in ran.complaint
    assert not (tmp_path / "out").exists()
