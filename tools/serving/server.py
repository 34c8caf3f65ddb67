"""Run the application with uvicorn in one process: its socket, the engines, and a graceful end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from edm_deploy.errors import InputError
from edm_deploy.serving.interface import ImageService
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from edm_deploy_tools.serving.app import AppSettings, create_app

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FLUSH = 5  # seconds that answers have to reach their clients, once every request has one


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket that is bound to an address; port 0 takes a free one.

    Raises:
        InputError: The port is in use, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
            bound.listen()  # here: a second server that has bound the same port is found at this call
        except OSError:
            bound.close()
            raise
        return bound
    except (OSError, OverflowError) as err:
        reason = getattr(err, "strerror", None) or str(err)
        raise InputError(f"The server cannot use {host}:{port}: {reason}. Choose another --port or --host.") from err


def named_directories(engines: Sequence[str]) -> dict[str, Path]:
    """Engine directories by the name of the model: `NAME=DIR`, or `DIR`, whose name is that of the directory.

    Raises:
        InputError: Two have the same name.
    """
    named: dict[str, Path] = {}
    for text in engines:
        name, equals, directory = text.partition("=")
        path = Path(directory if equals else text)
        name = name if equals else path.resolve().name
        if name in named:
            raise InputError(f"Two engines are named {name!r}: {named[name]} and {path}. Name one as NAME=DIR.")
        named[name] = path
    return named


def open_replicas(
    engines: Mapping[str, Path],
    limits: Limits,
    *,
    slots: int | None = None,
    pad: bool = True,
    source: str | None = None,
    device: str | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    threads: int | None = None,
) -> dict[str, Replica]:
    """Open engines and call each once, so that the first request is as fast as the others.

    Args:
        engines: Engine directories by the name of the model.
        limits: What each accepts.
        slots: As `ServedModel`.
        pad: As `Replica`.
        source: As `ServedModel`.
        device: As `ServedModel`.
        loras: Files of LoRAs that every engine has, with their weights.
        threads: As `ServedModel`.

    Raises:
        InputError, ArtifactError, UnsupportedError: As `ServedModel`; none stays open.
    """
    with contextlib.ExitStack() as stack:
        replicas = {}
        for name, directory in engines.items():
            model = ServedModel(directory, name=name, slots=slots, source=source, device=device, threads=threads)
            stack.callback(model.close)
            for path, weight in loras:
                model.denoiser.load_lora(path, weight=weight)
            model.warm_up(pad=pad)
            replicas[name] = Replica(model, limits, pad=pad)
            stack.callback(replicas[name].close)
        stack.pop_all()
    return replicas


class HttpServer(uvicorn.Server):
    """Serves until it is stopped, by SIGTERM or Ctrl-C in the main thread. Then accepted requests are finished, or answered 503 after `drain` seconds; new
    ones are answered 503 meanwhile. A second signal ends the draining.

    Args:
        services: The models by name.
        bound: A bound socket; closed at the end.
        settings: Of the application.
        drain: Seconds.
        started: Receives the address when requests are taken.
    """

    def __init__(
        self,
        services: Mapping[str, ImageService],
        bound: socket.socket,
        settings: AppSettings,
        *,
        drain: float,
        started: Callable[[str], None] = lambda url: None,
    ) -> None:
        app = create_app(services, settings)
        # In its own log each request has a line.
        quiet: dict[str, Any] = {"log_config": None, "access_log": False, "server_header": False}
        super().__init__(uvicorn.Config(app, loop="asyncio", lifespan="off", timeout_graceful_shutdown=FLUSH, **quiet))
        self._services, self._bound, self._drain, self._started = services, bound, drain, started
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_until_stopped(self) -> None:
        """Serve; returns once it has been stopped."""
        self.run(sockets=[self._bound])

    def stop(self) -> None:
        """Begin to drain, from any thread; a second call ends every request now."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; then reports the address."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        host, port = self._bound.getsockname()[:2]
        self._started(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Drain at a signal, where uvicorn would stop listening and then end by the signal."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in SIGNALS:
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        seconds = 0.0 if self._draining is not None else self._drain
        self._draining = asyncio.get_running_loop().create_task(self._drained(seconds))

    async def _drained(self, seconds: float) -> None:
        # A service that cannot drain, such as one whose process has died, does not keep the server.
        await asyncio.gather(*(service.drain(seconds) for service in self._services.values()), return_exceptions=True)
        self.should_exit = True
