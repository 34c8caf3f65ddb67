import asyncio
import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from edm_deploy.serving.interface import Accepted, EngineError, Finished, ImageRequest, Preview, Progress
from edm_deploy_tools.serving.answers import Answering, ClientGoneError, encoded, stream, while_connected, whole_answer

ANSWERING = Answering("m", ImageRequest(id="a"), "image_generation")
PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)


async def iterated(*events):
    for event in events:
        if isinstance(event, Exception):
            raise event
        yield event


async def lines_of(*events):
    return [line async for line in stream(ANSWERING, iterated(*events))]


@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_a_png_without_loss(channels):
    text = asyncio.run(encoded(PIXELS[..., :channels]))
    found = np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))).reshape(2, 3, channels)
    assert np.array_equal(found, PIXELS[..., :channels])


def test_images_are_in_the_order_of_the_request_however_they_finish():
    events = [Finished(image=1, seed=8, pixels=PIXELS), Progress(image=0, step=1, steps=2), Finished(image=0, seed=7, pixels=PIXELS)]
    answer = asyncio.run(whole_answer(ANSWERING, iterated(*events)))
    assert [image["seed"] for image in answer["data"]] == [7, 8]
    assert answer["size"] == "3x2"


def test_each_event_is_a_server_sent_event_with_openais_names():
    lines = asyncio.run(
        lines_of(Progress(image=0, step=1, steps=2), Preview(image=0, number=0, pixels=PIXELS), Finished(image=0, seed=7, pixels=PIXELS))
    )
    names = ["image_generation.progress", "image_generation.partial_image", "image_generation.completed"]
    for line, name in zip(lines, names, strict=True):
        assert line.startswith(f"event: {name}\ndata: ") and line.endswith("\n\n") and line.count("\n") == 3
        assert json.loads(line.split("data: ")[1])["type"] == name


def test_an_error_ends_a_stream_as_an_event_and_a_client_that_went_is_told_nothing():
    assert json.loads(asyncio.run(lines_of(EngineError("broken")))[0].split("data: ")[1])["error"]["message"] == "broken"
    with pytest.raises(ClientGoneError):
        asyncio.run(lines_of(ClientGoneError()))


def test_the_request_is_closed_when_the_client_goes():
    closed = []

    class Service:
        async def submit(self, request):
            try:
                yield Accepted(ahead=0, memory=0)
                await asyncio.sleep(30)
            finally:
                closed.append(request.id)

    class Http:
        async def receive(self):
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

    async def main():
        events = while_connected(Http(), Service(), ImageRequest(id="a"))
        assert isinstance(await anext(events), Accepted)
        with pytest.raises(ClientGoneError):
            await anext(events)

    asyncio.run(main())
    assert closed == ["a"]
