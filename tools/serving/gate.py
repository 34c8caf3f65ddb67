"""What every HTTP request passes: an id, the API key, the size of its body, and one line in the log."""

from __future__ import annotations

import hmac
import json
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from edm_deploy.errors import InputError
from edm_deploy_tools.serving.errors import HttpError, http_error

KEYS_VARIABLE = "EDM_DEPLOY_API_KEYS"
PROTECTED = "/v1/"  # paths that need a key where there are keys
HEADER = "x-request-id"
LONGEST_ERROR = 4000  # characters in the log

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]


def read_keys(file: Path | None, variable: str | None = None) -> frozenset[str]:
    """API keys: the lines of a file, and those of the environment variable EDM_DEPLOY_API_KEYS, separated by commas. None is needed where this is empty.

    Args:
        file: Lines that are empty or start with `#` are no keys.
        variable: Value of the variable; None reads it.

    Raises:
        InputError: The file cannot be read or has no keys.
    """
    named = os.environ.get(KEYS_VARIABLE, "") if variable is None else variable
    keys = {key.strip() for key in named.split(",")}
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as err:
            raise InputError(
                f"--api-keys {file} cannot be read: {getattr(err, 'strerror', None) or 'it is no text'}. Name a text file."
            ) from err
        found = {line for line in lines if line and not line.startswith("#")}
        if not found:
            raise InputError(f"--api-keys {file} has no keys, expected one a line. Without the option no key is needed.")
        keys |= found
    return frozenset(keys - {""})


@dataclass(frozen=True)
class RequestLog:
    """One JSON object a line for each request.

    Attributes:
        stream: Where to; None is the process's stderr.
    """

    stream: TextIO | None = None

    def write(self, **fields: Any) -> None:
        """Write a line with the time, UTC. A log that cannot be written (a full disk) ends no request."""
        stream = self.stream or sys.stderr
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **{key: value for key, value in fields.items() if value is not None},
        }
        try:
            stream.write(json.dumps(line) + "\n")
            stream.flush()
        except OSError:
            return


class Gate:
    """ASGI middleware around the application.

    Args:
        app: The application.
        keys: API keys; empty for none.
        largest_body: Bytes of a body at most.
        log: Receives a line for each request.
        count: Receives path and status of each request.
    """

    def __init__(self, app: Any, *, keys: frozenset[str], largest_body: int, log: RequestLog, count: Callable[[str, int], None]) -> None:
        self._app, self._keys, self._largest, self._log, self._count = app, keys, largest_body, log, count

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id, start = f"img-{uuid.uuid4().hex}", time.perf_counter()
        noted: dict[str, Any] = {}  # by the endpoint, for the log
        scope.setdefault("state", {}).update(request_id=request_id, noted=noted)
        status = 0
        received = 0

        async def limited() -> Message:
            nonlocal received
            message: Message = await receive()
            received += len(message.get("body", b""))
            if received > self._largest:
                raise self._too_large(received)
            return message

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (HEADER.encode(), request_id.encode())]
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, limited, noting)
        except Exception as err:  # ours included: it is in the log, and the caller has an answer
            noted["error"] = (
                str(err)[:LONGEST_ERROR] if isinstance(err, HttpError) else "".join(traceback.format_exception(err))[-LONGEST_ERROR:]
            )
            if not status:
                await http_error(err).response(scope, receive, noting)
        finally:
            seconds = round(time.perf_counter() - start, 4)
            self._count(scope["path"], status)
            self._log.write(
                event="request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status or 499,
                seconds=seconds,
                **noted,
            )

    def _check(self, scope: Scope) -> None:
        """Raises HttpError where the key is wrong or the body is announced to be too large."""
        headers = {name.lower(): value for name, value in scope["headers"]}
        if self._keys and scope["path"].startswith(PROTECTED):
            scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
            fits = [hmac.compare_digest(key.strip().encode(), known.encode()) for known in self._keys]  # all, so that time tells nothing
            if scheme.lower() != "bearer" or not any(fits):
                message = "Incorrect API key." if key else "No API key was sent."
                raise HttpError(
                    401,
                    f"{message} Send the header Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._largest:
            raise self._too_large(int(length))

    def _too_large(self, size: int) -> HttpError:
        return HttpError(413, f"The body has {size} bytes or more, expected at most {self._largest}. Send less.", code="body_too_large")
