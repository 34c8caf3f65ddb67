"""Answers: images as JSON, or as server-sent events while they are computed."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from starlette.requests import Request

from edm_deploy.serving.interface import Event, Finished, ImageRequest, ImageService, Pixels, Preview, Progress
from edm_deploy_tools.serving.errors import http_error


class ClientGoneError(Exception):
    """The client has closed its connection."""


@dataclass(frozen=True)
class Answering:
    """What all answers to one request have in common.

    Attributes:
        model: Name of the model.
        request: The request to its replica.
        kind: Prefix of the events' names, `image_generation` or `image_edit`.
    """

    model: str
    request: ImageRequest
    kind: str


async def while_connected(http: Request, service: ImageService, request: ImageRequest) -> AsyncIterator[Event]:
    """The events of a request, which is cancelled when the client closes its connection.

    Raises:
        ClientGoneError: The client has gone.
        EdmDeployError: As `ImageService.submit`.
    """
    events = service.submit(request)
    gone = asyncio.create_task(_disconnected(http))
    try:
        while True:
            following = asyncio.ensure_future(anext(events, None))
            await asyncio.wait({following, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                following.cancel()
                await asyncio.wait({following})
                raise ClientGoneError
            if (event := following.result()) is None:
                return
            yield event
    finally:
        gone.cancel()
        await events.aclose()  # type: ignore[attr-defined]  # of an async generator: ends the request where it has not ended


async def whole_answer(answering: Answering, events: AsyncIterator[Event]) -> dict[str, Any]:
    """The answer with all images.

    Source: OpenAI's API reference, "Create image": `created` and `data`, with `b64_json` for each image.
    """
    finished = [event async for event in events if isinstance(event, Finished)]
    data = [{"b64_json": await encoded(event.pixels), "seed": event.seed} for event in sorted(finished, key=lambda event: event.image)]
    return {
        "created": int(time.time()),
        "model": answering.model,
        "output_format": "png",
        "size": size_of(finished[0].pixels),
        "data": data,
    }


async def stream(answering: Answering, events: AsyncIterator[Event]) -> AsyncIterator[str]:
    """Server-sent events: previews, images, our `KIND.progress` where it was asked for, and an `error` where the request ends early.

    Source: OpenAI's API reference, "Image streaming": `image_generation.partial_image` and `image_generation.completed`, each with `b64_json`; here with the
    `image_index` of several images.
    """
    common = {"created_at": int(time.time()), "model": answering.model, "output_format": "png"}
    try:
        async for event in events:
            match event:
                case Progress():
                    fields: dict[str, Any] = {"image_index": event.image, "step": event.step, "steps": event.steps}
                    yield _event(f"{answering.kind}.progress", fields)
                case Preview():
                    picture = {"b64_json": await encoded(event.pixels), "size": size_of(event.pixels)}
                    fields = {"partial_image_index": event.number, "image_index": event.image}
                    yield _event(f"{answering.kind}.partial_image", common | fields | picture)
                case Finished():
                    picture = {"b64_json": await encoded(event.pixels), "size": size_of(event.pixels)}
                    yield _event(f"{answering.kind}.completed", common | {"image_index": event.image, "seed": event.seed} | picture)
    except ClientGoneError:
        raise
    except Exception as err:  # the status has been sent: the error is an event
        yield _event("error", http_error(err).content)


async def encoded(pixels: Pixels) -> str:
    """uint8 [H, W, C] as PNG in base64, made in a thread."""
    return await asyncio.to_thread(_encoded, pixels)


def size_of(pixels: Pixels) -> str:
    """`WIDTHxHEIGHT`."""
    return f"{pixels.shape[1]}x{pixels.shape[0]}"


def _encoded(pixels: Pixels) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _event(name: str, fields: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | fields)}\n\n"


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
