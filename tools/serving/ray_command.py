"""The command `serve` with `--ray`: deploy, and on a cluster that was started here stay until a signal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edm_deploy.errors import InputError
from edm_deploy.runtime.manifest import NAME as MANIFEST
from edm_deploy.runtime.manifest import Manifest, ShapeRange
from edm_deploy.serving.model import DEFAULT_SLOTS
from edm_deploy.storage.directories import sha256_of
from edm_deploy_tools.common import console
from edm_deploy_tools.common.machine import versions
from edm_deploy_tools.common.ray_cluster import LOCAL


@dataclass(frozen=True, kw_only=True)
class Deployed:
    """Where and how often: address of the cluster, `N` or `MIN:MAX` replicas, and the address to listen on."""

    address: str
    replicas: str
    host: str
    port: int


def run_on_ray(engines: Mapping[str, Path], where: Deployed, *, loras: Sequence[tuple[Path, float]] = (), **served: Any) -> None:
    """Deploy engines on Ray Serve.

    Args:
        engines: Engine directories by the name of the model.
        where: Cluster, replicas and address.
        loras: Files of LoRAs that every engine has, with their weights.
        served: Further fields of `ServedEngines`.

    Raises:
        InputError, ArtifactError, UnsupportedError: As `ray_app.deployed` and `Manifest.read`.
    """
    from edm_deploy_tools.serving.ray_app import Replicas, deployed, serve_until
    from edm_deploy_tools.serving.ray_engines import ServedEngines

    replicas = Replicas.parse(where.replicas)
    if where.port == 0:
        raise InputError("--port 0: Ray Serve needs a port. Choose one, such as 8000.")
    batches = [Manifest.read(directory, kind="engine").profile.get("batch", ShapeRange(1, 1, 1)) for directory in engines.values()]
    slots = served.get("slots") or min(DEFAULT_SLOTS, *(allowed.max for allowed in batches))
    content = ServedEngines(
        engines={name: directory.resolve() for name, directory in engines.items()},
        digests={name: sha256_of(directory / MANIFEST) for name, directory in engines.items()},
        versions=versions(),
        loras=tuple((path.resolve(), weight) for path, weight in loras),
        **served,
    )
    words = f"{', '.join(engines)} on Ray, {where.replicas} replicas, at http://{where.host}:{where.port}"
    with deployed(content, replicas, address=where.address, host=where.host, port=where.port, slots=slots):
        if where.address != LOCAL:
            console.say(f"Deployed {words}. Deploy again to update it, replica by replica; `serve shutdown` ends it.")
            return
        stopped = threading.Event()
        before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            serve_until(stopped, content.drain, lambda: console.say(f"Serving {words}"))
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    console.say("Stopped.")
