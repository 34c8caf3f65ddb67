import inspect

import numpy as np
import pytest
import torch

from edm_deploy import load_pipeline
from edm_deploy_tools.triton.served_pipeline import arguments, pixels


@pytest.fixture(scope="module")
def pipeline(chain):
    """The pipeline of a tiny pixel-space model."""
    return load_pipeline(chain.engine)


def test_each_seed_is_a_picture_whatever_the_others(pipeline):
    def images(*seeds: int):
        return pixels(pipeline(**arguments(pipeline, {"seed": np.array(seeds), "steps": np.array([2], np.int32)})).images)

    both = images(3, 4)
    assert (both.dtype, both.shape, both.flags.c_contiguous) == (np.uint8, (2, 8, 8, 3), True)
    assert np.array_equal(both, np.concatenate([images(3), images(4)]))
    assert pipeline(**arguments(pipeline, {"steps": np.array([1], np.int32)})).images.shape[0] == 1  # a request without a seed


def test_an_input_that_the_pipeline_does_not_take_is_refused(pipeline):
    with pytest.raises(ValueError, match="This model takes no guidance_scale; expected some of batch_size"):
        arguments(pipeline, {"guidance": np.array([2.0], np.float32)})


def test_prompts_are_text_and_labels_are_repeated():
    class Prompted:
        def __call__(self, prompt, guidance_scale, num_images_per_prompt, generator, output_type, class_labels=None): ...

    found = arguments(
        Prompted(),
        {
            "prompt": np.array([b"a cat"], object),
            "guidance": np.array([2.0], np.float32),
            "seed": np.array([1, 2]),
            "class_label": np.array([7]),
        },
    )
    assert (found["prompt"], found["guidance_scale"], found["num_images_per_prompt"]) == ("a cat", 2.0, 2)
    assert torch.equal(found["class_labels"], torch.tensor([7, 7]))
    assert set(found) <= set(inspect.signature(Prompted()).parameters)
