"""Bodies of requests, strictly decoded: OpenAI's fields that the engines honour, and ours."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from msgspec import Meta
from PIL import Image

from edm_deploy.errors import ArtifactError
from edm_deploy.numerics.seeds import LARGEST_SEED
from edm_deploy.serving.interface import ImageRequest, Pixels
from edm_deploy.storage.json_schema import check_bounded, convert
from edm_deploy_tools.serving.errors import HttpError

LARGEST_SIDE = 16384  # pixels, of a request; the engine's profile bounds it further
LARGEST_PICTURE = 64 << 20  # pixels of an uploaded picture, before it is decoded
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")
SEEDS_DRAWN = 2**31  # a drawn seed is below, so that JavaScript represents it exactly


@dataclass(frozen=True, kw_only=True)
class GenerationBody:
    """The fields of `/v1/images/generations`. Those from `seed` on are ours.

    Attributes:
        prompt: For text-conditional models.
        model: Name of an engine; may be left out where there is one.
        n: Number of images.
        size: `WIDTHxHEIGHT` in pixels, or `auto`.
        response_format: `b64_json`.
        output_format: `png`.
        stream: Whether to answer with server-sent events.
        partial_images: Previews of each image in a stream.
        user: The caller's name of its user, for the log.
        seed: Of the first image; drawn if left out.
        steps: Inference steps.
        scheduler: Short name.
        guidance: Guidance scale.
        negative_prompt: What the images should not show.
        label: Class, for class-conditional models.
        progress: Whether a stream has an event for each step.
    """

    prompt: str | None = None
    model: str | None = None
    n: Annotated[int, Meta(ge=1, le=10_000)] = 1
    size: Annotated[str, Meta(max_length=16)] = "auto"
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: Annotated[int, Meta(ge=0, le=1000)] = 0
    user: Annotated[str, Meta(max_length=256)] | None = None
    seed: Annotated[int, Meta(ge=0, le=LARGEST_SEED)] | None = None
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] = 20
    scheduler: Annotated[str, Meta(max_length=64)] | None = None
    guidance: Annotated[float, Meta(ge=0, le=1000)] | None = None
    negative_prompt: str | None = None
    label: Annotated[int, Meta(ge=0, le=10_000_000)] | None = None
    progress: bool = False

    def request(self, request_id: str) -> ImageRequest:
        """The request to a replica.

        Raises:
            HttpError: The size is none.
        """
        width, height = _sides(self.size)
        return ImageRequest(
            id=request_id,
            count=self.n,
            seed=secrets.randbelow(SEEDS_DRAWN) if self.seed is None else self.seed,
            steps=self.steps,
            scheduler=self.scheduler,
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            label=self.label,
            guidance=self.guidance,
            height=height,
            width=width,
            previews=self.partial_images if self.stream else 0,
            progress=self.progress and self.stream,
        )


@dataclass(frozen=True, kw_only=True)
class EditBody(GenerationBody):
    """The fields of `/v1/images/edits` besides `image`.

    Attributes:
        strength: Share of the schedule that is computed from the picture on.
    """

    strength: Annotated[float, Meta(gt=0, le=1)] = 0.8


def generation_body(content: bytes) -> GenerationBody:
    """Decode a JSON body.

    Raises:
        HttpError: It is no JSON object, or a field is unknown, of another type or out of bounds.
    """
    try:
        decoded = json.loads(content)
    except (ValueError, RecursionError) as err:
        raise HttpError(400, f'The body is no JSON: {err}. Send an object such as {{"prompt": "a cat"}}.', code="invalid_json") from err
    if not isinstance(decoded, dict):
        raise HttpError(400, f"The body is {type(decoded).__name__} in JSON, expected an object.", code="invalid_json")
    return _converted(decoded, GenerationBody)


def edit_body(fields: Mapping[str, str]) -> EditBody:
    """Decode the text fields of a form.

    Raises:
        HttpError: As `generation_body`.
    """
    return _converted({name: _value(name, text) for name, text in fields.items()}, EditBody)


def picture(content: bytes, size: tuple[int, int]) -> Pixels:
    """An uploaded picture as uint8 [height, width, 3], scaled to `size`, which is height and width in pixels.

    Raises:
        HttpError: It is no PNG, JPEG or WebP picture, or too large.
    """
    try:
        with Image.open(io.BytesIO(content), formats=PICTURE_FORMATS) as opened:
            if opened.width * opened.height > LARGEST_PICTURE:
                raise HttpError(
                    400,
                    f"image has {opened.width}x{opened.height} pixels, expected at most {LARGEST_PICTURE}. Scale it down.",
                    param="image",
                )
            scaled = opened.convert("RGB").resize((size[1], size[0]), Image.Resampling.LANCZOS)
            return np.asarray(scaled)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as err:
        raise HttpError(400, "image is no picture that can be read, expected PNG, JPEG or WebP. Send another file.", param="image") from err


def _converted(content: dict[str, Any], schema: Any) -> Any:
    try:
        check_bounded(content)
        return convert(content, schema, forbid_unknown=True)
    except ArtifactError as err:
        message = str(err)
        unknown = message.startswith("The file has a field")
        field = message.split('"')[1] if unknown else message.split(" ")[0]
        raise HttpError(400, message.replace("The file", "The body", 1), param=field, code="unknown_field" if unknown else None) from err


def _sides(size: str) -> tuple[int | None, int | None]:
    """Width and height in pixels; None for the model's own."""
    if size == "auto":
        return None, None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", size)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not found or max(sides) > LARGEST_SIDE:
        raise HttpError(
            400, f'size is {json.dumps(size)}, expected WIDTHxHEIGHT of 1 to {LARGEST_SIDE} pixels each, or "auto".', param="size"
        )
    return sides


def _value(name: str, text: str) -> Any:
    """The value of a form's text field: parsed as JSON where the field is not a string."""
    kinds = {field.name: str(field.type) for field in dataclasses.fields(EditBody)}
    if "str" in kinds.get(name, "str") or "Literal" in kinds.get(name, ""):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
