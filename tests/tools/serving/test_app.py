import base64
import contextlib
import io
import json
import threading
import time

import numpy as np
import pytest
from PIL import Image

from edm_deploy_tools.images.sample import GenerationRequest, sample_images
from tests.tools.serving.http_client import serving


def decoded(picture: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))


def form(fields, picture=None):
    """Body and headers of a multipart form."""
    parts = [f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()]
    if picture is not None:
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
        parts.append(head + picture + b"\r\n")
    return b"".join(parts) + b"--b--\r\n", {"Content-Type": "multipart/form-data; boundary=b"}


def png(size=(8, 8), colour="red"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_an_image_is_that_of_the_command_sample(client, chain, tmp_path):
    answer = client.generate(seed=3, steps=4)
    assert answer.status == 200, answer.body
    (made,) = answer.json["data"]
    assert made["seed"] == 3
    expected = sample_images(chain.engine, tmp_path / "images", GenerationRequest(num_images=1, seed=3, steps=4)).paths[1]
    # The engine computes a batch of 4 here and of 1 there, so that float32 sums may round to another code of a layer's input.
    assert np.abs(decoded(made["b64_json"]).astype(int) - np.asarray(Image.open(expected)).astype(int)).mean() < 1


def test_several_images_come_in_the_order_of_their_seeds(client):
    answer = client.generate(seed=3, steps=2, n=3)
    assert [image["seed"] for image in answer.json["data"]] == [3, 4, 5]
    assert answer.json["size"] == "8x8"
    second = client.generate(seed=4, steps=2).json["data"][0]["b64_json"]
    assert answer.json["data"][1]["b64_json"] == second


def test_a_stream_has_previews_and_steps_and_ends_with_the_image(client):
    answer = client.generate(seed=3, steps=4, stream=True, partial_images=1, progress=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    names = [name for name, _ in answer.events]
    assert names.count("image_generation.progress") == 4
    assert names[-1] == "image_generation.completed"
    assert names.count("image_generation.partial_image") == 1
    assert all(event["type"] == name for name, event in answer.events)
    whole = client.generate(seed=3, steps=4).json["data"][0]["b64_json"]
    assert answer.events[-1][1]["b64_json"] == whole


def test_images_may_start_from_a_picture(client):
    def edited(**fields):
        answer = client.send("POST", "/v1/images/edits", *form({"seed": 1, "steps": 10} | fields, png()))
        assert answer.status == 200, answer.body
        return decoded(answer.json["data"][0]["b64_json"]).astype(int)

    red = np.broadcast_to([255, 0, 0], (8, 8, 3))
    assert np.abs(edited(strength=0.1) - red).mean() < np.abs(edited(strength=1) - red).mean()
    streamed = client.send("POST", "/v1/images/edits", *form({"steps": 2, "stream": "true"}, png((16, 4))))
    assert streamed.events[-1][0] == "image_edit.completed"


REFUSED_FORMS = {
    "no image": (*form({"steps": 2}), 400, "The form has no file image"),
    "no picture": (*form({}, b"text"), 400, "image is no picture"),
    "field": (*form({"mask": "x"}, png()), 400, 'has a field "mask"'),
    "size": (*form({"size": "4096x4096"}, png()), 400, "sides of at most 32 pixels"),
    "no form": (b"{}", {"Content-Type": "application/json"}, 415, "expected multipart/form-data"),
    "cut": (form({"steps": 2}, png())[0][:80], {"Content-Type": "multipart/form-data"}, 400, "boundary"),
    "many fields": (*form({f"f{number}": 1 for number in range(40)}, png()), 400, "Too many fields"),
}


@pytest.mark.parametrize("what", REFUSED_FORMS)
def test_a_malformed_form_is_one_clear_error(client, what):
    content, headers, status, message = REFUSED_FORMS[what]
    answer = client.send("POST", "/v1/images/edits", content, headers)
    assert answer.status == status
    assert message in answer.error["message"]


REFUSED = {
    "prompt": ({"prompt": "a cat"}, 400, "takes no text"),
    "long prompt": ({"prompt": "a" * 100_000}, 400, "prompt length is 100000, expected at most 4000"),
    "images": ({"n": 11}, 400, "n is 11, expected at most 10"),
    "steps": ({"steps": 151}, 400, "steps is 151, expected at most 150"),
    "size": ({"size": "64x64"}, 400, "outside the engine's profile"),
    "scheduler": ({"scheduler": "eulr"}, 400, "Did you mean 'euler'"),
    "model": ({"model": "other"}, 404, "There is no model 'other', expected one of tiny"),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_or_the_limits_refuse_is_one_clear_error(client, what, stream):
    fields, status, message = REFUSED[what]
    answer = client.generate(**fields, stream=stream)
    assert answer.status == status
    assert message in answer.error["message"]


def test_unknown_paths_and_methods_are_errors_in_the_same_shape(client):
    assert client.get("/v1/nothing").status == 404
    assert client.get("/v1/images/generations").status == 405
    assert "Method Not Allowed" in client.get("/v1/images/generations").error["message"]


def test_models_health_and_metrics_are_listed(client):
    (model,) = client.get("/v1/models").json["data"]
    assert (model["id"], model["object"], model["takes_prompt"], model["schedulers"][0]) == ("tiny", "model", False, "ddim")
    assert client.get("/health").json == {
        "status": "ok",
        "models": {"tiny": {"state": "ready", "reason": "", "slots": 4, "occupied": 0, "requests": 0, "waiting": 0, "running": 0}},
    }
    assert b'edm_images_total{model="tiny"}' in client.get("/metrics").body


def test_the_page_needs_no_network(client):
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert b"http://" not in page.body and b"https://" not in page.body


def wait_until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_whose_client_hangs_up_is_cancelled(replica, stream):
    """Also one that waits without sending anything."""
    with serving({"tiny": replica}) as client:
        with contextlib.closing(client.connection()) as connection:
            body = json.dumps({"steps": 150, "n": 10, "stream": stream})
            connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
            wait_until(lambda: replica._loop.stats().running)
        wait_until(lambda: replica._loop.stats().cancelled == 1)
        assert replica._loop.jobs == []


def test_a_full_queue_is_429_with_the_time_of_another_try(replica):
    with serving({"tiny": replica}, drain=0) as client, contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(contextlib.closing(client.connection()))
            connection.request("POST", "/v1/images/generations", b'{"steps": 150, "n": 10}')
        wait_until(lambda: len(replica._loop.jobs) == 8)
        answer = client.generate(steps=1)
        assert answer.status == 429
        assert answer.error["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1


def test_several_models_are_chosen_by_name(replica, served_model):
    with serving({"one": replica, "two": replica}) as client:
        assert client.generate(model="two", steps=1).json["model"] == "two"
        refused = client.generate(steps=1)
        assert (refused.status, refused.error["param"]) == (400, "model")
        assert "expected one of one, two" in refused.error["message"]


@pytest.mark.parametrize(("drain", "statuses"), [(30, {200}), (0, {503})])
def test_a_server_that_stops_answers_every_request_that_it_has_accepted(replica, drain, statuses):
    answers = []
    with serving({"tiny": replica}, drain=drain) as client:
        threads = [threading.Thread(target=lambda: answers.append(client.generate(steps=30, n=2))) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(replica._loop.jobs) == 4)
    for thread in threads:
        thread.join()
    assert {answer.status for answer in answers} == statuses
    assert all(answer.status == 200 or "shutting down" in answer.error["message"] for answer in answers)


def test_an_engine_that_fails_in_a_stream_is_an_event(replica, monkeypatch):
    calls = []

    def failing(*_, **__):
        calls.append(1)
        raise RuntimeError("out of luck")

    monkeypatch.setattr(replica.model, "predict", failing)
    with serving({"tiny": replica}) as client:
        answer = client.generate(steps=2, stream=True)
        assert answer.status == 200
        assert answer.events[-1][0] == "error"
        assert "The engine failed: RuntimeError: out of luck" in answer.events[-1][1]["error"]["message"]
        assert client.generate(steps=2).status == 500
        assert client.generate(steps=2).status in (500, 503)
        wait_until(lambda: client.get("/health").status == 503)
        assert client.generate(steps=2).status == 503
