"""Connect to a Ray cluster, or start one in this process; what Ray reports of a failure becomes one line."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from edm_deploy.errors import InputError, UnsupportedError, first_line

LOCAL = "local"
DEFAULT_PORT = 6379  # of `ray start --head`
CLIENT = "ray://"
REACH_SECONDS = 5.0  # to open a connection, before Ray is tried, which waits longer and prints a traceback
QUIET = {
    "RAY_DEDUP_LOGS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}


@contextlib.contextmanager
def cluster(address: str, *, cpus: int) -> Iterator[Any]:
    """The package `ray`, connected to a cluster; disconnected at the end, and a cluster that was started here is stopped.

    Where this process is connected already, that connection is used and stays.

    Args:
        address: `local` starts one in this process; `HOST:PORT` or `ray://HOST:PORT` is one that runs; `auto` the one that runs on this machine.
        cpus: CPUs of a cluster that is started.

    Raises:
        UnsupportedError: Ray is not installed, the cluster is not reachable, or has another version of Ray or Python.
        InputError: An address without a port.
    """
    check_address(address)
    for variable, value in QUIET.items():
        os.environ.setdefault(variable, value)
    import ray

    if ray.is_initialized():
        yield ray
        return
    options: dict[str, Any] = {"num_cpus": cpus, "include_dashboard": False} if address == LOCAL else {"address": address}
    try:
        ray.init(logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as err:
        words = " ".join(str(err).split())
        if "ersion mismatch" in words:
            raise UnsupportedError(f"--ray {address}: {words.rstrip('.')}. Install the cluster's versions of Python and Ray here.") from err
        raise UnsupportedError(
            f"--ray {address} cannot be reached: {first_line(err)}. Start it with `ray start --head`, or give another address."
        ) from err
    try:
        yield ray
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address at which nothing listens.

    Raises:
        InputError: It has no port.
        UnsupportedError: Nothing listens there.
    """
    if address in (LOCAL, "auto"):
        return
    host, separator, port = address.removeprefix(CLIENT).rpartition(":")
    if not separator or not host or not port.isdigit():
        raise InputError(
            f"--ray {address}: expected local, auto, HOST:PORT (the port of `ray start --head`, {DEFAULT_PORT}) or ray://HOST:PORT."
        )
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as err:
        raise UnsupportedError(
            f"--ray {address} cannot be reached: {getattr(err, 'strerror', None) or first_line(err)}. Start it with `ray start --head`, or give another address."
        ) from err
