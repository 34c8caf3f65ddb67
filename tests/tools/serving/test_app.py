import base64
import io

import numpy as np
from PIL import Image

from edm_deploy_tools.images.sample import GenerationRequest, sample_images


def decoded(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


def test_an_image_is_that_of_the_command_sample(client, chain, tmp_path):
    answer = client.generate(seed=3, steps=4)
    assert answer.status == 200, answer.body
    (made,) = answer.json["data"]
    assert made["seed"] == 3
    expected = sample_images(chain.engine, tmp_path / "images", GenerationRequest(num_images=1, seed=3, steps=4)).paths[1]
    # One code in a few may round another way: the engine computes a batch of 4 here and of 1 there.
    assert np.abs(decoded(made["b64_json"]).astype(int) - np.asarray(Image.open(expected)).astype(int)).mean() < 1


def test_a_stream_has_previews_and_steps_and_ends_with_the_image(client):
    answer = client.generate(seed=3, steps=4, stream=True, partial_images=1, progress=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    names = [name for name, _ in answer.events]
    assert names.count("image_generation.progress") == 4
    assert names[-1] == "image_generation.completed"
    assert names.count("image_generation.partial_image") == 1
    whole = client.generate(seed=3, steps=4).json["data"][0]["b64_json"]
    assert answer.events[-1][1]["b64_json"] == whole
