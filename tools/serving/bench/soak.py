"""A soak of a server: many requests, some cancelled and some malformed, while replicas are killed; lost answers and growth of memory are counted."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import psutil

from edm_deploy_tools.serving.bench.client import PATH, post

REPLICA = "ServeReplica:edm-deploy:engines"  # in the title of Ray Serve's processes that hold engines
SERVER = ("ray::", "edm_deploy_tools serve")  # processes whose memory is read
WARM_UP = 0.1  # share of the requests after which memory is read for the first time
KINDS = 40  # distinct valid requests, whose images are compared with the first ones
TIMEOUT = 600.0  # an answer that takes longer is lost
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b'{"steps": -1}',
    b'{"steps": "many"}',
    b'{"size": "99999x99999"}',
    b'{"n": 0}',
    b'{"unknown": 1}',
    b'{"scheduler": "magic"}',
    b'{"model": "other"}',
    json.dumps({"prompt": "x" * 100_000}).encode(),
)


@dataclass
class Figures:
    """Answers and memory.

    Attributes:
        answers: Answers to valid requests by status.
        malformed: Answers to malformed requests by status.
        cancelled: Requests whose connection was closed by the client.
        lost: Requests without an answer: a closed connection, or none in TIMEOUT.
        wrong: Images that differ from an earlier one of the same request, malformed requests that were not refused, and requests that stayed in the queue.
        kills: Replicas that were killed.
        growth_mb: Growth of the memory of each process of the server that lived from the end of the warm-up to the end, by its title.
        seconds: Wall time.
        messages: The first few things that went wrong.
    """

    answers: Counter[int] = field(default_factory=Counter)
    malformed: Counter[int] = field(default_factory=Counter)
    cancelled: int = 0
    lost: int = 0
    wrong: int = 0
    kills: int = 0
    growth_mb: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    messages: list[str] = field(default_factory=list)

    def failed(self, max_growth_mb: float) -> bool:
        """Whether an answer was lost or wrong, or memory grew by more than was accepted."""
        return bool(self.lost or self.wrong or max(self.growth_mb.values(), default=0.0) > max_growth_mb)


class Soak:
    """One soak of a server that listens on a port of this machine.

    Args:
        port: The port.
        processes: Returns the server's processes.
        seed: Of the requests.
        cancelled: Share of requests that are cancelled.
        malformed: Share of requests that are malformed.
    """

    def __init__(self, port: int, processes: Callable[[], list[psutil.Process]], *, seed: int, cancelled: float, malformed: float) -> None:
        self.port, self.processes, self.seed, self.cancelled, self.malformed = port, processes, seed, cancelled, malformed
        self.figures = Figures()
        self._images: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._sent = 0
        self._memory: dict[int, tuple[str, int]] = {}

    def run(self, requests: int, *, connections: int, steps: tuple[int, int], kill_every: float, notify: Callable[[str], None]) -> None:
        """Send the requests.

        Args:
            requests: Number of requests.
            connections: Requests at once.
            steps: Fewest and most steps of a request.
            kill_every: Seconds between two kills of a replica; 0 kills none.
            notify: Receives a line every minute.
        """
        start, stopped = time.monotonic(), threading.Event()
        threads = [threading.Thread(target=self._work, args=(number, requests, steps)) for number in range(connections)]
        killer = threading.Thread(target=self._kill, args=(kill_every, stopped))
        for thread in threads:
            thread.start()
        if kill_every:
            killer.start()
        last = start
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if not self._memory and self._sent >= WARM_UP * requests:
                self._memory = self._resident()
            if time.monotonic() - last > 60:
                last = time.monotonic()
                notify(
                    f"{self._sent} of {requests} requests, {self.figures.lost} lost, {self.figures.wrong} wrong, {self.figures.kills} kills"
                )
        stopped.set()
        if kill_every:
            killer.join()
        self._check_empty()
        self.figures.seconds = time.monotonic() - start
        after = self._resident()
        for pid, (title, size) in self._memory.items():
            if pid in after:
                self.figures.growth_mb[f"{title} ({pid})"] = round((after[pid][1] - size) / 1e6, 1)

    def _work(self, number: int, requests: int, steps: tuple[int, int]) -> None:
        chance = random.Random(self.seed * 1009 + number)
        while True:
            with self._lock:
                if self._sent >= requests:
                    return
                self._sent += 1
            draw = chance.random()
            try:
                if draw < self.malformed:
                    self._send_malformed(chance)
                elif draw < self.malformed + self.cancelled:
                    self._cancel(chance, steps)
                else:
                    self._send(chance.randrange(KINDS), steps)
            except (OSError, http.client.HTTPException) as err:
                with self._lock:
                    self.figures.lost += 1
                    self._note(f"lost: {type(err).__name__}: {err}")

    def _send(self, kind: int, steps: tuple[int, int]) -> None:
        span = steps[1] - steps[0] + 1
        status, content = post(self.port, json.dumps({"seed": kind, "steps": steps[0] + kind % span}).encode(), timeout=TIMEOUT)
        image = json.loads(content)["data"][0]["b64_json"].encode() if status == 200 else b""
        digest = hashlib.sha256(image).digest()
        with self._lock:
            self.figures.answers[status] += 1
            if status == 200 and self._images.setdefault(kind, digest) != digest:
                self.figures.wrong += 1
                self._note(f"seed {kind} gave another image than before")
            elif status not in (200, 429, 503):
                self.figures.wrong += 1
                self._note(f"a valid request was answered {status}: {content[:200]!r}")

    def _send_malformed(self, chance: random.Random) -> None:
        body = chance.choice(MALFORMED)
        if body == MALFORMED[0]:
            body = bytes(chance.randrange(256) for _ in range(64))
        status, content = post(self.port, body, timeout=TIMEOUT)
        with self._lock:
            self.figures.malformed[status] += 1
            if not 400 <= status < 500:
                self.figures.wrong += 1
                self._note(f"{body[:60]!r} was answered {status}: {content[:200]!r}")

    def _cancel(self, chance: random.Random, steps: tuple[int, int]) -> None:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)) as connection:
            body = {"seed": 1, "steps": steps[1], "stream": True, "progress": True}
            connection.request("POST", PATH, json.dumps(body), {"Content-Type": "application/json"})
            if chance.random() < 0.5:
                connection.getresponse().read(16)
        with self._lock:
            self.figures.cancelled += 1

    def _kill(self, every: float, stopped: threading.Event) -> None:
        chance = random.Random(self.seed)
        while not stopped.wait(every):
            replicas = [process for process in self.processes() if REPLICA in title_of(process)]
            if replicas:
                with contextlib.suppress(psutil.NoSuchProcess):
                    chance.choice(replicas).kill()
                    self.figures.kills += 1

    def _check_empty(self) -> None:
        """Enter requests that are still in the server's queue a while after the last answer."""
        left = -1
        for _ in range(100):
            with contextlib.suppress(OSError, http.client.HTTPException):
                left = sum(model["requests"] for model in health(self.port)["models"].values())
                if left == 0:
                    return
            time.sleep(0.1)
        self.figures.wrong += 1
        self._note(f"{left} requests stayed in the queue")

    def _resident(self) -> dict[int, tuple[str, int]]:
        found = {}
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                title = title_of(process)
                if any(name in title for name in SERVER):
                    found[process.pid] = (title[:60], int(process.memory_info().rss))
        return found

    def _note(self, message: str) -> None:
        if len(self.figures.messages) < 10:
            self.figures.messages.append(message)


def title_of(process: psutil.Process) -> str:
    """The command line or title of a process; empty where it has ended."""
    try:
        return " ".join(" ".join(process.cmdline()).split())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""


def health(port: int) -> Any:  # JSON
    """The answer of `/health`."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())
