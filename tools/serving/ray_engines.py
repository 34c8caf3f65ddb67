"""A replica of Ray Serve: the engines that it holds, multiplexed by name, each with its in-flight loop."""

from __future__ import annotations

import asyncio
import contextlib
import platform
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray import serve

from edm_deploy.errors import ArtifactError, EdmDeployError, UnsupportedError
from edm_deploy.runtime.manifest import NAME as MANIFEST
from edm_deploy.serving.interface import Event, ImageRequest, ModelCard, Stats
from edm_deploy.serving.model import ServedModel
from edm_deploy.serving.replica import Limits, Replica
from edm_deploy.storage.directories import sha256_of
from edm_deploy_tools.common.machine import check_versions, versions


@dataclass(frozen=True, kw_only=True)
class ServedEngines:
    """What every replica is given.

    Attributes:
        engines: Engine directories by the name of the model, by paths that every machine has.
        digests: sha256 of each engine's manifest.
        limits: What each engine accepts in one replica.
        versions: Package versions that every machine must have; empty accepts any.
        slots, source, device, threads: As `ServedModel`.
        pad: As `Replica`.
        loras: Files of LoRAs that every engine has, with their weights.
        together: Engines that a replica holds at once; the one that was used least recently makes room for another.
        drain: Seconds that accepted requests have to finish.
        keys: API keys of the application.
    """

    engines: Mapping[str, Path]
    digests: Mapping[str, str]
    limits: Limits = field(default_factory=Limits)
    versions: Mapping[str, str] = field(default_factory=dict)
    slots: int | None = None
    pad: bool = True
    source: str | None = None
    device: str | None = None
    threads: int = 1
    loras: tuple[tuple[Path, float], ...] = ()
    together: int = 3
    drain: float = 60.0
    keys: frozenset[str] = frozenset()

    def check(self) -> None:
        """Refuse this machine where its packages or engines are not those of the machine that deployed.

        Raises:
            UnsupportedError: A package has another version.
            ArtifactError: An engine is missing, or another one.
        """
        check_versions(self.versions, versions(), where=f"The worker on {platform.node()}")
        for name, directory in self.engines.items():
            if not (directory / MANIFEST).is_file():
                raise ArtifactError(f"{directory} is no engine on {platform.node()}. Put it where every machine reaches it by this path.")
            if sha256_of(directory / MANIFEST) != self.digests[name]:
                raise ArtifactError(f"{directory} on {platform.node()} is another engine than the one that was deployed. Deploy again.")


@dataclass(frozen=True)
class Failure:
    """The end of a request by an error, as an item of its stream: Ray would wrap an exception in one of its own, with a traceback for a message."""

    error: EdmDeployError


class OpenedEngine:
    """An engine with its loop, which ends its requests before its memory is released."""

    def __init__(self, replica: Replica, drain: float) -> None:
        self.replica, self._drain, self._closed = replica, drain, False

    def __del__(self) -> None:
        """Called by Ray Serve, in a thread, before it loads another engine in place of this one."""
        if not self._closed:
            self._closed = True
            asyncio.run(self.replica.drain(self._drain))
            self.replica.close()


class EngineReplica:
    """The methods of a replica; `deployed_class` adds the multiplexed cache of engines.

    Args:
        served: What it serves. An engine is opened at the first request for it, the first ones of `served` at once.
    """

    def __init__(self, served: ServedEngines) -> None:
        served.check()
        torch.set_num_threads(served.threads)
        self.served = served
        self._open_engines: dict[str, OpenedEngine] = {}

    async def opened(self, name: str) -> OpenedEngine:
        """The engine of a name, from the cache."""
        raise NotImplementedError  # by deployed_class

    async def open(self, name: str) -> OpenedEngine:
        """Open an engine and call it once."""
        engine = await asyncio.to_thread(self._open, name)
        self._open_engines[name] = engine
        return engine

    async def card(self) -> ModelCard | Failure:
        """What the model of the request's name is and takes."""
        try:
            return await (await self.opened(serve.get_multiplexed_model_id())).replica.card()
        except EdmDeployError as err:
            return Failure(err)

    async def submit(self, request: ImageRequest) -> AsyncIterator[Event | Failure]:
        """The events of a request to the model of the request's name; the last one is a Failure where it ends early."""
        try:
            engine = await self.opened(serve.get_multiplexed_model_id())
            async with contextlib.aclosing(engine.replica.submit(request)) as events:  # type: ignore[type-var]  # an async generator
                async for event in events:
                    yield event
        except EdmDeployError as err:
            yield Failure(err)

    async def stats(self) -> dict[str, Stats]:
        """Statistics of the engines that are open, by name."""
        return {name: await engine.replica.stats() for name, engine in self._open_engines.items()}

    async def check_health(self) -> None:
        """Called by Ray Serve, which restarts a replica where this raises: an engine has failed for good."""
        for name, stats in (await self.stats()).items():
            if stats.state == "failed":
                raise RuntimeError(f"{name}: {stats.reason}")

    def _open(self, name: str) -> OpenedEngine:
        served = self.served
        if name not in served.engines:
            raise UnsupportedError(f"There is no model {name!r}, expected one of {', '.join(served.engines)}.")
        model = ServedModel(
            served.engines[name], name=name, slots=served.slots, source=served.source, device=served.device, threads=served.threads
        )
        try:
            for path, weight in served.loras:
                model.denoiser.load_lora(path, weight=weight)
            model.warm_up(pad=served.pad)
            return OpenedEngine(Replica(model, served.limits, pad=served.pad), served.drain)
        except BaseException:
            model.close()
            raise


def deployed_class(together: int) -> Any:  # a class
    """`EngineReplica` with a cache of `together` engines, kept by Ray Serve's multiplexing, which routes a request to a replica that has its engine."""

    class Engines(EngineReplica):
        async def __init__(self, served: ServedEngines) -> None:  # type: ignore[misc]  # Ray Serve awaits it
            EngineReplica.__init__(self, served)
            for name in list(served.engines)[:together]:
                await self.opened(name)

        @serve.multiplexed(max_num_models_per_replica=together)
        async def opened(self, name: str) -> OpenedEngine:
            for closed in [other for other, engine in self._open_engines.items() if engine._closed]:
                del self._open_engines[closed]
            return await self.open(name)

    return Engines
