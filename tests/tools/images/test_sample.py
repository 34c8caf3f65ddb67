from __future__ import annotations

from dataclasses import replace

import pytest
from PIL import Image

from edm_deploy.errors import InputError
from edm_deploy.export.onnx import onnx_from_artifact
from edm_deploy.runtime.manifest import ShapeRange
from edm_deploy.storage.directories import INDEX_FILE, SCHEDULER_FILE
from edm_deploy_tools.images.pipeline_arguments import GenerationRequest
from edm_deploy_tools.images.sample import batch_sizes, grid_of, sample_images
from engines import build_engine
from tests.conftest import FLOW_SCHEDULER, PIPELINE


def test_batches_stay_within_the_profile():
    assert batch_sizes(20, ShapeRange(1, 8, 16)) == [16, 4]
    assert batch_sizes(32, ShapeRange(1, 8, 16)) == [16, 16]
    assert batch_sizes(3, ShapeRange(4, 4, 4)) == [4]


def test_more_images_than_a_batch_are_sampled(chain, tmp_path):
    drawn = sample_images(chain.engine, tmp_path / "images", GenerationRequest(num_images=10, steps=2))
    assert drawn.count == 10
    assert len(list((tmp_path / "images").glob("[0-9]*.png"))) == 10
    assert drawn.seconds_per_image == pytest.approx(drawn.seconds / 10)


def test_a_flow_of_pixels_is_sampled_with_its_own_scheduler(chain, artifact_w4a4, tmp_path):
    index = PIPELINE[INDEX_FILE] | {"scheduler": ["diffusers", FLOW_SCHEDULER["_class_name"]]}
    onnx_from_artifact(replace(artifact_w4a4, pipeline={INDEX_FILE: index, SCHEDULER_FILE: FLOW_SCHEDULER}), tmp_path / "onnx")
    build_engine(tmp_path / "onnx", tmp_path / "engine", backend="ort")
    drawn = sample_images(tmp_path / "engine", tmp_path / "images", GenerationRequest(num_images=1, steps=2))  # from timestep 1000, sigma 1
    assert drawn.scheduler == "FlowMatchEulerDiscrete"
    assert sample_images(chain.engine, tmp_path / "others", GenerationRequest(num_images=1, steps=2)).scheduler == "DDIM"


def test_the_grid_enlarges_small_images_and_keeps_their_colours():
    grid = grid_of([Image.new("RGB", (8, 8), color) for color in ("red", "green", "blue")])
    assert grid.size == (2 * 100 - 4, 2 * 100 - 4)
    assert grid.getpixel((0, 0)) == (255, 0, 0)
    assert grid.getpixel((195, 195)) == (255, 255, 255)


def test_a_directory_of_something_else_is_left_alone(chain, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(Exception, match="holds other files"):
        sample_images(chain.engine, tmp_path, GenerationRequest(num_images=1, steps=1))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("counts", [{"num_images": 0}, {"steps": 0}])
def test_no_images_and_no_steps_are_refused(counts):
    with pytest.raises(InputError, match="at least 1"):
        GenerationRequest(**counts)


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_outside_its_range_is_refused(seed):
    with pytest.raises(InputError, match=f"seed is {seed}; expected an integer from 0 to 9223372036854775807"):
        GenerationRequest(seed=seed)


def test_prompts_are_sampled_guided_and_in_the_engines_batches(run, prompted, tmp_path):
    ran = run("sample", prompted.engine, "--out", tmp_path / "i", "--prompt", "a cat", "--prompt", "a dog", "--num-images", 4, "--steps", 2)
    assert ran.code == 0, ran.err
    assert "4 images of 16x16" in ran.out
    assert "2 steps of PNDM" in ran.out
    images = [Image.open(tmp_path / "i" / f"{index:03d}.png").tobytes() for index in range(4)]
    assert len(set(images)) == 4


def test_the_image_depends_on_the_prompt_and_repeats_with_the_seed(prompted, tmp_path):
    def drawn(prompt, **request):
        sampled = sample_images(prompted.engine, tmp_path / "i", GenerationRequest(prompts=(prompt,), steps=2, **request))
        return Image.open(sampled.paths[1]).tobytes()

    cat = drawn("a cat")
    assert drawn("a cat") == cat
    assert drawn("a dog") != cat
    assert drawn("a cat", negative_prompt="zebra") != cat
    assert drawn("a cat", guidance=1.0) != cat


def test_an_engine_samples_other_sizes_within_its_profile(run, prompted, tmp_path):
    ran = run("sample", prompted.engine, "--out", tmp_path / "i", "--prompt", "a", "--height", 32, "--width", 24, "--steps", 1)
    assert "1 images of 24x32" in ran.out
    ran = run("sample", prompted.engine, "--out", tmp_path / "j", "--prompt", "a", "--height", 64, "--steps", 1)
    assert "outside the engine's profile 8:8:16" in ran.complaint
    assert not (tmp_path / "j").exists()


def test_a_truncated_prompt_is_a_warning_and_is_sampled(run, prompted, tmp_path):
    ran = run("sample", prompted.engine, "--out", tmp_path / "i", "--prompt", "a" * 100, "--steps", 1)
    assert ran.code == 0
    assert ran.err.count("reads the first 77") == 1
