"""Errors as answers, in the shape of OpenAI's API."""

from __future__ import annotations

import math
from typing import Any

from starlette.responses import JSONResponse

from edm_deploy.errors import ArtifactError, InputError, UnsupportedError
from edm_deploy.serving.interface import BusyError, EngineError, UnavailableError


class HttpError(Exception):
    """An answer that ends a request early.

    Args:
        status: HTTP status.
        message: Found, expected and remedy, in one line.
        param: The field or header that is wrong.
        code: OpenAI's code of the error.
        headers: Further headers of the answer.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code
        self.headers = headers or {}

    @property
    def content(self) -> dict[str, Any]:
        """The body of the answer.

        Source: OpenAI's API reference, "Error codes": an object `error` with message, type, param and code.
        """
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.content, self.status, self.headers)


def http_error(err: BaseException) -> HttpError:
    """The answer to a request that ended with `err`; what the caller cannot change is told without details."""
    match err:
        case HttpError():
            return err
        case BusyError():
            return HttpError(429, str(err), code="queue_full", headers={"Retry-After": str(math.ceil(err.retry_after))})
        case UnavailableError():
            return HttpError(503, str(err), code="unavailable", headers={"Retry-After": "5"})
        case EngineError():
            return HttpError(500, str(err), code="engine_error")
        case InputError() | UnsupportedError():
            return HttpError(400, str(err), param=_field(str(err)))
        case ArtifactError():
            return HttpError(500, str(err), code="engine_error")
        case _:
            return HttpError(500, "The server failed at this request; its log has the reason.", code="internal_error")


FIELDS = (
    "negative_prompt",
    "prompt",
    "n",
    "size",
    "seed",
    "steps",
    "scheduler",
    "guidance",
    "label",
    "strength",
    "image",
    "partial_images",
)


def _field(message: str) -> str | None:
    """The field that a message begins with, if it does."""
    first = message.replace("The ", "", 1).split(" ")[0].strip(":'\"").lower()
    first = {"height": "size", "width": "size", "count": "n", "previews": "partial_images"}.get(first, first)
    return first if first in FIELDS else None
