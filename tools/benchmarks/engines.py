"""Engines and float baselines timed in turns, in one process: what disturbs one disturbs all."""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from edm_deploy.errors import InputError, UnsupportedError
from edm_deploy.models import family_named
from edm_deploy.network.family import SAMPLE, Family
from edm_deploy.registry import suggestion
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import Manifest
from edm_deploy.storage.weight_loading import cast
from edm_deploy_tools.benchmarks.float_engine import float_engine
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.machine import machine, versions
from engines import backend_named

BASELINES = ("torch", "torch-bf16", "torch-fp16", "openvino-fp32", "openvino-bf16", "ort-fp32")
HALVES: Mapping[str, torch.dtype] = {"torch-bf16": torch.bfloat16, "torch-fp16": torch.float16}
WARM_UP = 3  # calls before the first one that counts: compilation, caches, memory pools
Call = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One contestant.

    Attributes:
        name: In the table.
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
    """A finished benchmark.

    Attributes:
        conditions: What a number needs to mean something: machine, versions, batch, n, date.
        timings: The baseline first.
        batch: Samples a call.
    """

    conditions: Mapping[str, Any]
    timings: tuple[Timing, ...]
    batch: int

    def rows(self) -> list[Row]:
        """One line for each contestant, with its speed relative to the first."""
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
        """Every figure, by name."""
        return {
            "conditions": dict(self.conditions),
            "results": self.rows(),
            "seconds": {timing.name: list(timing.seconds) for timing in self.timings},
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
    """Time one forward pass of a batch: baselines first, then the engines.

    Args:
        engines: Engine directories of one architecture.
        against: Names of BASELINES: the float model of the engines' architecture (weights are random: they do not change the time).
        batch: Samples a call, each at its own timestep.
        rounds: Measurements of each contestant, in turns.
        threads: CPU threads of torch and of the float baselines; None leaves their own defaults. An engine keeps the threads it was built with.
        device: Where engines and torch's baselines run; None is where the first engine's backend does.

    Raises:
        InputError: No engines, a number below 1, engines of different architectures, or a batch over an engine's profile.
        UnsupportedError: An unknown baseline, or an engine that cannot run on this machine.
    """
    manifests = [Manifest.read(path, kind="engine") for path in engines]
    check_request(engines, manifests, against, batch, rounds, threads)
    if threads:
        torch.set_num_threads(threads)
    family, config = family_named(manifests[0].family), manifests[0].config
    device = device or backend_named(str(manifests[0].backend)).device
    inputs = {name: value.to(device) for name, value in inputs_of(family, config, manifests[0].num_train_timesteps, batch).items()}
    with ExitStack() as scratch:
        model = random_model(family, config).to(device)
        calls: dict[str, Call] = {}
        for name in against:
            calls[name] = baseline(name, manifests[0], model, inputs, threads, scratch)
        for path in engines:
            for part, call in engine_calls(path, inputs, device).items():
                calls[unused(f"{path.resolve().name}{part}", calls)] = call
        timings = in_turns(calls, rounds)
    return Bench(conditions=conditions(batch, rounds, threads), timings=timings, batch=batch)


def check_request(
    engines: Sequence[Path], manifests: Sequence[Manifest], against: Sequence[str], batch: int, rounds: int, threads: int | None
) -> None:
    """Refuse what cannot be measured, before anything is loaded."""
    if not engines:
        raise InputError("No engine was given. Name one or more directories that build-engine wrote, or use --finetune-step MODEL.")
    check_counts(batch, rounds, threads)
    for name in against:
        if name not in BASELINES:
            raise UnsupportedError(f"No baseline {name!r}.{suggestion(name, BASELINES)} Known: {', '.join(BASELINES)}.")
    for path, manifest in zip(engines, manifests, strict=True):
        if (manifest.family, manifest.config) != (manifests[0].family, manifests[0].config):
            raise InputError(f"{path} and {engines[0]} are engines of different models. Compare engines of one model.")
        allowed = manifest.profile.get("batch")
        if allowed and not allowed.min <= batch <= allowed.max:
            raise InputError(
                f"--batch {batch} lies outside the profile {allowed.min}:{allowed.opt}:{allowed.max} of {path}. Choose one inside, or build again."
            )


def check_counts(batch: int, rounds: int, threads: int | None) -> None:
    """Raises InputError where one of them is below 1."""
    for name, value in (("--batch", batch), ("--rounds", rounds), ("--threads", threads)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value}: expected 1 or more.")


def random_model(family: Family, config: Mapping[str, Any]) -> nn.Module:
    """The float model with random weights, without touching torch's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return family.build(config).eval().requires_grad_(False)


def inputs_of(family: Family, config: Mapping[str, Any], num_train_timesteps: int, batch: int) -> dict[str, Tensor]:
    """Inputs of one call, the timesteps spread over the schedule."""
    generator = torch.Generator().manual_seed(0)
    timesteps = torch.linspace(0, num_train_timesteps - 1, batch).round()
    sample = torch.randn(batch, *family.sample_shape(config), generator=generator)
    return {SAMPLE: sample, "timestep": timesteps} | family.random_conditioning(config, batch, generator)


def baseline(
    name: str, manifest: Manifest, model: nn.Module, inputs: Mapping[str, Tensor], threads: int | None, scratch: ExitStack
) -> Call:
    """One call of a float baseline."""
    family = family_named(manifest.family)
    if not name.startswith("torch"):
        backend, _, precision = name.partition("-")
        path = scratch.enter_context(
            float_engine(manifest, model, backend=backend, precision=precision, threads=threads, batch=len(inputs[SAMPLE]))
        )
        (call,) = engine_calls(path, inputs, None).values()
        return call
    if name in HALVES:
        model = cast(random_model(family, manifest.config).to(inputs[SAMPLE].device), HALVES[name])
        inputs = {
            key: value.to(HALVES[name]) if value.is_floating_point() and key != "timestep" else value for key, value in inputs.items()
        }
    return torch.no_grad()(lambda: family.forward(model, inputs))


def engine_calls(path: Path, inputs: Mapping[str, Tensor], device: str | None) -> dict[str, Call]:
    """One call of an engine through the drop-in, checks included: what a pipeline pays. By what is added to the engine's name.

    A pipeline's batch stands at one timestep, so an engine with relaxed timesteps is two contestants, each at timesteps of its own.
    """
    denoiser = load_denoiser(path, device=device)
    given = {name: value.to(denoiser.device) for name, value in inputs.items()}
    engine_of_timestep = denoiser.manifest.engine_of_timestep
    if engine_of_timestep is None:
        return {"": lambda: denoiser(**given)}

    def call(number: int) -> Call:
        own = torch.nonzero(engine_of_timestep == number)[:, 0]
        timesteps = own[torch.linspace(0, len(own) - 1, len(given[SAMPLE])).round().long()].float()
        placed = given | {"timestep": timesteps.to(denoiser.device)}
        return lambda: denoiser(**placed)

    return {"": call(0), " relaxed": call(1)}


def in_turns(calls: Mapping[str, Call], rounds: int) -> tuple[Timing, ...]:
    """Time each call `rounds` times; every round calls each once."""
    for call in calls.values():
        for _ in range(WARM_UP):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()  # a call returns before its kernels have run
            seconds[name].append(time.perf_counter() - start)
    return tuple(Timing(name=name, seconds=tuple(found)) for name, found in seconds.items())


def conditions(batch: int, rounds: int, threads: int | None) -> dict[str, Any]:
    """What stands beside every figure."""
    return {
        "batch": batch,
        "rounds": rounds,
        "threads": threads or torch.get_num_threads(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        **machine(),
        **versions(),
    }


def unused(name: str, taken: Mapping[str, object]) -> str:
    """`name`, with a number where it is taken."""
    return name if name not in taken else next(f"{name} {count}" for count in range(2, 1000) if f"{name} {count}" not in taken)
