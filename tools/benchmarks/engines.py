"""Time engines and float baselines alternately in one process, so that a disturbance affects all of them alike."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.family import SAMPLE, Family
from edm_deploy.registry import suggestion
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy_tools.benchmarks.baselines import BASELINES, Baselines, Call
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.machine import measurement_conditions
from engines import backend_named

log = logging.getLogger(__name__)

WARM_UP = 3  # calls before the first measured one: compilation, caches, memory pools


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Measured calls of an engine or a baseline.

    Attributes:
        name: Name in the table.
        seconds: Wall time of each measured call.
    """

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median wall time in seconds."""
        return median(self.seconds)


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A completed benchmark.

    Attributes:
        conditions: Machine, versions, batch, number of measurements, date.
        timings: The baselines, then the engines.
        batch: Samples per call.
        skipped: Engines that cannot run on this machine, with the reason, by path.
    """

    conditions: Mapping[str, Any]
    timings: tuple[Timing, ...]
    batch: int
    skipped: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """One row for each baseline and engine, with its speed relative to the first."""
        first = self.timings[0]
        return [
            {
                "name": timing.name,
                "median ms": round(1000 * timing.median, 2),
                "least ms": round(1000 * min(timing.seconds), 2),
                "samples/s": round(self.batch / timing.median, 1),
                f"times {first.name}": round(first.median / timing.median, 2),
                "n": len(timing.seconds),
            }
            for timing in self.timings
        ]

    def to_json(self) -> dict[str, Any]:
        """All figures by name."""
        return {
            "conditions": dict(self.conditions),
            "results": self.rows(),
            "seconds": {timing.name: list(timing.seconds) for timing in self.timings},
            "skipped": dict(self.skipped),
        }


def bench_engines(
    engines: Sequence[Path],
    *,
    against: Sequence[str] = ("torch",),
    batch: int = 16,
    rounds: int = 20,
    threads: int | None = None,
    device: str | None = None,
) -> Bench:
    """Time one forward pass of a batch, at the usual height and width of the first engine's profile: baselines first, then the engines.

    An engine that cannot run on this machine is skipped with a warning if another one can.

    Args:
        engines: Engine directories of one architecture.
        against: Names from BASELINES.
        batch: Samples per call, each at a different timestep.
        rounds: Measurements of each baseline and engine; every round measures each once.
        threads: CPU threads of torch and of the float baselines; None is their default. An engine uses the threads it was built with.
        device: Where engines and torch's baselines run; None is the default device of the first engine's backend.

    Raises:
        InputError: No engines, a number below 1, engines of different architectures, or a batch outside an engine's profile.
        UnsupportedError: An unknown baseline, or no engine can run on this machine.
    """
    manifests = {path: Manifest.read(path, kind="engine") for path in engines}
    check_request(manifests, against, batch, rounds, threads)
    if threads:
        torch.set_num_threads(threads)
    denoisers, skipped = open_engines(manifests, device)
    manifest = manifests[next(iter(denoisers))]
    for path in denoisers:
        check_batch(path, manifests[path], batch)
    family, config = family_named(manifest.family), config_at_profile(manifest)
    device = device or backend_named(str(manifest.backend)).default_device(manifest)
    inputs = {name: value.to(device) for name, value in inputs_of(family, config, manifest.num_train_timesteps, batch).items()}
    with ExitStack() as scratch:
        baselines = Baselines(manifest=manifest, config=config, inputs=inputs, threads=threads, scratch=scratch)
        calls = baselines.calls(tuple(dict.fromkeys(against)))
        for path, denoiser in denoisers.items():
            for part, call in engine_calls(denoiser, inputs).items():
                calls[unused(f"{path.resolve().name}{part}", calls)] = call
        timings = alternate(calls, rounds)
    return Bench(conditions=conditions(batch, rounds, threads), timings=timings, batch=batch, skipped=skipped)


def check_request(manifests: Mapping[Path, Manifest], against: Sequence[str], batch: int, rounds: int, threads: int | None) -> None:
    """Refuse a request that cannot be measured, before anything is loaded; see `bench_engines`."""
    if not manifests:
        raise InputError("No engine was given. Name one or more directories that build-engine wrote, or use --finetune-step MODEL.")
    check_counts(batch, rounds, threads)
    for name in against:
        if name not in BASELINES:
            raise UnsupportedError(f"No baseline {name!r}.{suggestion(name, BASELINES)} Known: {', '.join(BASELINES)}.")
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if (manifest.family, manifest.config) != (first.family, first.config):
            raise InputError(f"{path} and {first_path} are engines of different models. Compare engines of one model.")


def open_engines(manifests: Mapping[Path, Manifest], device: str | None) -> tuple[dict[Path, EngineDenoiser], dict[str, str]]:
    """The engines that run on this machine, and the reason why each other one does not, by path.

    Raises:
        UnsupportedError: No engine runs here; the error of the first one.
    """
    denoisers: dict[Path, EngineDenoiser] = {}
    errors: dict[Path, UnsupportedError] = {}
    for path, manifest in manifests.items():
        try:
            denoisers[path] = load_denoiser(path, device=device or backend_named(str(manifest.backend)).default_device(manifest))
        except UnsupportedError as err:
            errors[path] = err
            continue
        device = device or str(denoisers[path].device)
    if not denoisers:
        raise next(iter(errors.values()))
    skipped = {str(path): str(error) for path, error in errors.items()}
    for name, reason in skipped.items():
        log.warning("%s is skipped: %s", name, reason)
    return denoisers, skipped


def check_batch(path: Path, manifest: Manifest, batch: int) -> None:
    """Raises InputError if a batch is outside the profile of an engine."""
    allowed = manifest.profile.get("batch")
    if allowed and not allowed.min <= batch <= allowed.max:
        raise InputError(
            f"--batch {batch} is outside the profile {allowed.min}:{allowed.opt}:{allowed.max} of {path}. Choose one inside, or build again."
        )


def check_counts(batch: int, rounds: int, threads: int | None) -> None:
    """Raises InputError if one of the numbers is below 1."""
    for name, value in (("--batch", batch), ("--rounds", rounds), ("--threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: expected 1 or more.")


def config_at_profile(manifest: Manifest) -> Mapping[str, Any]:
    """The model's config, with the usual height and width of the engine's profile as its sample size."""
    sizes = tuple(manifest.profile[side].opt for side in ("height", "width") if side in manifest.profile)
    if len(sizes) != 2 or sizes == family_named(manifest.family).sample_size(manifest.config):
        return manifest.config
    return {**manifest.config, "sample_size": list(sizes)}


def inputs_of(family: Family, config: Mapping[str, Any], num_train_timesteps: int, batch: int) -> dict[str, Tensor]:
    """Random inputs of one call; the timesteps are spread over the noise schedule."""
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.linspace(0, num_train_timesteps - 1, batch).round()
    sample = torch.randn(batch, *family.sample_shape(config), generator=generator)
    return {SAMPLE: sample, "timestep": timesteps} | family.random_conditioning(config, batch, generator)


def engine_calls(denoiser: EngineDenoiser, inputs: Mapping[str, Tensor]) -> dict[str, Call]:
    """Calls of an engine through its drop-in denoiser, input checks included, by suffix of the engine's name.

    All samples of a pipeline's batch have the same timestep, so an engine with float timesteps is timed twice, each time at timesteps of one of its
    two graphs.
    """
    placed = {name: value.to(denoiser.device) for name, value in inputs.items()}
    engine_of_timestep = denoiser.manifest.engine_of_timestep
    if engine_of_timestep is None:
        return {"": lambda: denoiser(**placed)}

    def call(number: int) -> Call:
        own = torch.nonzero(engine_of_timestep == number)[:, 0]
        timesteps = own[torch.linspace(0, len(own) - 1, len(placed[SAMPLE])).round().long()].float()
        chosen = placed | {"timestep": timesteps.to(denoiser.device)}
        return lambda: denoiser(**chosen)

    return {"": call(0), " relaxed": call(1)}


def alternate(calls: Mapping[str, Call], rounds: int) -> tuple[Timing, ...]:
    """Time each call `rounds` times; every round calls each once."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # untyped in torch
                torch.cuda.synchronize()  # a call returns before its kernels have run
            seconds[name].append(time.perf_counter() - start)
    return tuple(Timing(name=name, seconds=tuple(times)) for name, times in seconds.items())


def conditions(batch: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """The conditions that are stated with every figure."""
    return {"batch": batch, "rounds": rounds, "threads": threads or torch.get_num_threads(), **measurement_conditions()}


def unused(name: str, taken: Mapping[str, object]) -> str:
    """`name`, with a number appended if it is taken."""
    return name if name not in taken else next(f"{name} {count}" for count in range(2, 1000) if f"{name} {count}" not in taken)
