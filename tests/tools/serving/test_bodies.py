import io
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from edm_deploy_tools.serving.bodies import edit_body, generation_body, picture
from edm_deploy_tools.serving.errors import HttpError


def test_fields_become_a_request():
    body = generation_body(json.dumps({"prompt": "a cat", "n": 2, "size": "32x16", "seed": 7, "steps": 9, "guidance": 3}).encode())
    request = body.request("id")
    assert (request.width, request.height, request.count, request.seed, request.steps, request.guidance) == (32, 16, 2, 7, 9, 3)
    assert request.previews == 0 and not request.progress


def test_a_seed_is_drawn_where_there_is_none():
    seeds = {generation_body(b"{}").request("id").seed for _ in range(5)}
    assert len(seeds) > 1 and all(0 <= seed < 2**31 for seed in seeds)


REFUSED = {
    "no JSON": (b"{", None, "The body is no JSON: Expecting"),
    "another encoding": (b"\xff\xfe\x00", None, "The body is no JSON"),
    "an array": (b"[]", None, "The body is list in JSON, expected an object"),
    "deep": (b"[" * 100_000, None, "The body is no JSON"),
    "unknown": (b'{"promt": "a"}', "promt", "The body has a field \"promt\", expected prompt, model, .*Did you mean 'prompt'"),
    "OpenAI's that is not supported": (b'{"quality": "hd"}', "quality", 'The body has a field "quality"'),
    "type": (b'{"n": "2"}', "n", 'n is "2", expected an integer'),
    "boolean": (b'{"n": true}', "n", "n is true, expected an integer"),
    "negative": (b'{"n": -1}', "n", "n is -1, expected an integer >= 1"),
    "huge": (b'{"n": 1' + b"0" * 30 + b"}", "n", "n is an integer of more than 18 digits"),
    "more digits than Python reads": (b'{"n": 1' + b"0" * 5000 + b"}", None, "The body is no JSON"),
    "NaN": (b'{"guidance": NaN}', "guidance", "guidance is nan, expected a finite number"),
    "half a character": (b'{"prompt": "\\ud800"}', "prompt", "expected text without lone surrogates"),
    "url": (b'{"response_format": "url"}', "response_format", 'response_format is "url", expected "b64_json"'),
    "jpeg": (b'{"output_format": "jpeg"}', "output_format", 'output_format is "jpeg", expected "png"'),
    "size": (b'{"size": "big"}', "size", 'size is "big", expected WIDTHxHEIGHT'),
    "negative size": (b'{"size": "-8x8"}', "size", 'size is "-8x8"'),
    "huge size": (b'{"size": "99999x8"}', "size", "1 to 16384 pixels"),
    "seed": (b'{"seed": 9223372036854775808}', "seed", "seed is an integer of more than 18 digits"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_malformed_body_is_one_clear_error(what):
    content, param, message = REFUSED[what]
    with pytest.raises(HttpError, match=message) as caught:
        generation_body(content).request("id")
    assert (caught.value.status, caught.value.param) == (400, param)
    assert "\n" not in caught.value.message


VALUES = st.none() | st.booleans() | st.floats() | st.text(max_size=10) | st.integers()


@settings(deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(["prompt", "n", "size", "seed", "steps", "x"]), VALUES, max_size=3))
def test_any_json_is_a_request_or_a_400(content):
    status = 200
    try:
        generation_body(json.dumps(content).encode()).request("id")
    except HttpError as err:
        status = err.status
    assert status in (200, 400)


def test_a_form_has_the_same_fields_as_text():
    body = edit_body({"prompt": "12", "n": "2", "strength": "0.5", "stream": "true"})
    assert (body.prompt, body.n, body.strength, body.stream) == ("12", 2, 0.5, True)
    with pytest.raises(HttpError, match='n is "many", expected an integer'):
        edit_body({"n": "many"})
    with pytest.raises(HttpError, match='The body has a field "mask"'):
        edit_body({"mask": "x"})


def png(size, mode="RGB"):
    buffer = io.BytesIO()
    Image.new(mode, size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def test_a_picture_is_scaled_to_the_size():
    pixels = picture(png((20, 10), "RGBA"), (8, 16))
    assert pixels.shape == (8, 16, 3)
    assert np.array_equal(pixels[4, 8], [255, 0, 0])


@pytest.mark.parametrize("content", [b"", b"no picture", png((20, 10))[:40], b"%PDF-1.4"], ids=["empty", "text", "cut", "pdf"])
def test_what_is_no_picture_is_refused(content):
    with pytest.raises(HttpError, match="image is no picture that can be read, expected PNG, JPEG or WebP"):
        picture(content, (8, 8))


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded():
    with pytest.raises(HttpError, match=r"image has 40000x40000 pixels|image is no picture"):
        # A header that announces 1.6 gigapixels, and no data.
        picture(b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + (40000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00" + bytes(4), (8, 8))
