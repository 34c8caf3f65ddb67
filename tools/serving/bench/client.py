"""A load of HTTP requests in a process of its own, so that it does not share the server's interpreter. Imports the standard library alone.

Run as `python -m edm_deploy_tools.serving.bench.client PORT CONNECTIONS SECONDS SEED`; prints the number of answers by status as JSON.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

PATH = "/v1/images/generations"
TIMEOUT = 600.0  # seconds without an answer


def post(port: int, body: bytes, *, timeout: float = TIMEOUT) -> tuple[int, bytes]:
    """Status and body of the answer to one request of this machine's server."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)) as connection:
        connection.request("POST", PATH, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read()


def load(port: int, connections: int, seconds: float, seed: int, *, steps: tuple[int, int] = (10, 50)) -> Counter[int]:
    """Keep `connections` requests of mixed steps open for some time; answers by status, 0 for none."""
    counts: Counter[int] = Counter()
    until = time.monotonic() + seconds

    def work(number: int) -> None:
        chance = random.Random(seed * 1009 + number)
        while time.monotonic() < until:
            fields: dict[str, Any] = {"seed": chance.randrange(2**31), "steps": chance.randint(*steps)}
            try:
                counts[post(port, json.dumps(fields).encode())[0]] += 1
            except (OSError, http.client.HTTPException):
                counts[0] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def main(arguments: Sequence[str]) -> None:
    """Run the load that the arguments describe."""
    port, connections, seconds, seed = (float(text) for text in arguments)
    print(json.dumps(load(int(port), int(connections), seconds, int(seed))))


if __name__ == "__main__":
    main(sys.argv[1:])
