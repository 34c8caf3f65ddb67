"""Deploy the application on Ray Serve: an HTTP deployment in front of replicas that hold engines."""

from __future__ import annotations

import asyncio
import contextlib
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayError

from edm_deploy.errors import ArtifactError, EdmDeployError, InputError, UnsupportedError, first_line
from edm_deploy_tools.common.ray_cluster import LOCAL, cluster
from edm_deploy_tools.serving.app import AppSettings, create_app
from edm_deploy_tools.serving.ray_engines import ServedEngines, deployed_class
from edm_deploy_tools.serving.ray_service import RayService
from edm_deploy_tools.serving.server import bound_socket

APPLICATION = "edm-deploy"
ENGINES = "engines"
HTTP = "http"
SPARE = 16  # calls of a replica besides its requests: statistics, and requests that are answered 429
POLL = 0.1  # seconds


@dataclass(frozen=True)
class Replicas:
    """How many replicas there are: as many as the queue needs, from `fewest` to `most`."""

    fewest: int
    most: int

    @classmethod
    def parse(cls, text: str) -> Replicas:
        """Of `N` or `MIN:MAX`.

        Raises:
            InputError: It is neither, or no replica is left.
        """
        found = re.fullmatch(r"(\d{1,6})(?::(\d{1,6}))?", text)
        replicas = cls(int(found[1]), int(found[2] or found[1])) if found else cls(0, 0)
        if not 1 <= replicas.fewest <= replicas.most:
            raise InputError(f"--replicas {text}: expected N or MIN:MAX with 1 <= MIN <= MAX.")
        return replicas


class HttpReplica:
    """The application with services of Ray; Ray Serve calls it for each HTTP request.

    Args:
        engines: Handle of the replicas.
        names: Names of the models. Nothing else of what is served: an update of an engine leaves this deployment running.
        keys: API keys.
    """

    def __init__(self, engines: Any, names: tuple[str, ...], keys: frozenset[str]) -> None:
        self._services = {name: RayService(name, engines) for name in names}
        self._keys = keys

    def __serve_build_asgi_app__(self) -> Any:  # the name is Ray Serve's
        return create_app(self._services, AppSettings(keys=self._keys))

    async def drain(self, seconds: float) -> bool:
        """Answer further requests with 503, and wait for the accepted ones; whether all of them ended."""
        for service in self._services.values():
            await service.drain(seconds)
        for _ in range(int(seconds / POLL) + 1):
            if not any(service._running for service in self._services.values()):
                return True
            await asyncio.sleep(POLL)
        return False


def application(served: ServedEngines, replicas: Replicas, slots: int) -> Any:  # serve.Application
    """The deployments of the application.

    Args:
        served: What is served.
        replicas: How many replicas. Ray Serve starts another one where each has more than `slots` requests, and ends one where fewer would do.
        slots: Rows of each call of an engine.
    """
    resources: dict[str, Any] = {"num_cpus": served.threads}
    if served.device == "cuda":
        resources["num_gpus"] = 1
    scaling: dict[str, Any] = {"num_replicas": replicas.fewest}
    if replicas.most > replicas.fewest:
        scaling = {"autoscaling_config": {"min_replicas": replicas.fewest, "max_replicas": replicas.most, "target_ongoing_requests": slots}}
    engines = serve.deployment(deployed_class(served.together)).options(
        name=ENGINES,
        max_ongoing_requests=len(served.engines) * served.limits.queue + SPARE,
        ray_actor_options=resources,
        graceful_shutdown_timeout_s=served.drain,
        health_check_period_s=5,
        **scaling,
    )
    http = serve.deployment(serve.ingress()(HttpReplica)).options(
        name=HTTP,
        max_ongoing_requests=10_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=served.drain,
    )
    return http.bind(engines.bind(served), tuple(served.engines), served.keys)


@contextlib.contextmanager
def deployed(served: ServedEngines, replicas: Replicas, *, address: str, host: str, port: int, slots: int) -> Iterator[Any]:
    """The application, deployed and ready, on a cluster; one that runs there already is updated, replica by replica.

    On a cluster that is started here the application ends with the block; elsewhere it stays.

    Args:
        served: What is served.
        replicas: How many replicas.
        address: As `ray_cluster.cluster`.
        host: Address to listen on; that of a cluster where Ray Serve runs already is kept.
        port: Port to listen on.
        slots: Rows of each call of an engine.

    Yields:
        The package `ray`.

    Raises:
        UnsupportedError: Ray is not installed or not reachable, or the replicas cannot be started.
        ArtifactError: A machine has not the engines.
        InputError: The port is in use.
    """
    if address == LOCAL:
        bound_socket(host, port).close()
    with cluster(address, cpus=replicas.most * served.threads) as ray:
        _check_workers(ray, served)
        started_here = address == LOCAL
        try:
            serve.start(http_options={"host": host, "port": port}, proxy_location="HeadOnly", logging_config={"log_level": "ERROR"})
            serve.run(application(served, replicas, slots), name=APPLICATION, route_prefix="/")
        except (RuntimeError, RayError, TimeoutError) as err:
            if started_here:
                serve.shutdown()
            raise UnsupportedError(
                f"Ray Serve could not start the application: {_reason(err)}. The logs of its session have more."
            ) from err
        try:
            yield ray
        finally:
            if started_here:
                serve.shutdown()


def drained(seconds: float) -> bool:
    """Refuse further requests of the deployed application, and wait for the accepted ones; whether all of them ended."""
    handle = serve.get_deployment_handle(HTTP, APPLICATION)
    try:
        return all(handle.broadcast("drain", seconds).results(timeout_s=seconds + 10))
    except (RayError, TimeoutError):
        return False


def serve_until(stopped: threading.Event, drain: float, started: Callable[[], None]) -> None:
    """Report the start, wait for `stopped`, then drain."""
    started()
    stopped.wait()
    drained(drain)


def _check_workers(ray: Any, served: ServedEngines) -> None:
    """Check versions and engines in a worker, where an error is one line; each replica checks its machine again."""

    def problem() -> str:
        try:
            served.check()
        except EdmDeployError as err:
            return str(err)
        return ""

    try:
        found = ray.get(ray.remote(num_cpus=0)(problem).remote())
    except RayError as err:
        raise UnsupportedError(f"A worker of the cluster cannot load edm-deploy: {_reason(err)}. Install the same version there.") from err
    if found:
        raise ArtifactError(found)


def _reason(err: BaseException) -> str:
    """The line of a traceback that names our error, or the last one, of what Ray reports."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    ours = [line.partition(": ")[2] for line in lines if re.match(r"edm_deploy\.errors\.\w+: ", line)]
    last = next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)), None)
    return (ours[-1] if ours else last or first_line(err)).rstrip(".")
