"""A server on a free port in a thread of the test, and plain HTTP to it."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import queue
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from edm_deploy.serving.interface import ImageService
from edm_deploy_tools.serving.app import AppSettings
from edm_deploy_tools.serving.gate import RequestLog
from edm_deploy_tools.serving.server import HttpServer, bound_socket

TIMEOUT = 60  # seconds; a test that waits longer fails


@dataclass(frozen=True)
class Answer:
    """A whole answer."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error of an answer in OpenAI's shape, one line."""
        error = self.json["error"]
        assert "\n" not in error["message"]
        return error

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """The server-sent events of a stream."""
        found = []
        for block in self.body.decode().strip().split("\n\n"):
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
        return found


@dataclass(frozen=True)
class Client:
    """Plain HTTP to a server of this machine."""

    port: int
    server: HttpServer

    def connection(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)

    def send(self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> Answer:
        with contextlib.closing(self.connection()) as connection:
            connection.request(method, path, body, dict(headers or {}))
            answer = connection.getresponse()
            return Answer(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())

    def get(self, path: str) -> Answer:
        return self.send("GET", path)

    def generate(self, **fields: Any) -> Answer:
        return self.send("POST", "/v1/images/generations", json.dumps(fields).encode(), {"Content-Type": "application/json"})


@contextlib.contextmanager
def serving(services: Mapping[str, ImageService], *, drain: float = 5, **settings: Any) -> Iterator[Client]:
    """A server of these models, which it does not close."""
    ready: queue.Queue[str] = queue.Queue()
    with bound_socket("127.0.0.1", 0) as bound:
        server = HttpServer(services, bound, AppSettings(**{"log": RequestLog(io.StringIO())} | settings), drain=drain, started=ready.put)
        thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
        thread.start()
        try:
            yield Client(int(ready.get(timeout=TIMEOUT).rpartition(":")[2]), server)
        finally:
            server.stop()
            thread.join(TIMEOUT)
            assert not thread.is_alive()
