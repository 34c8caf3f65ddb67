"""Calls of an engine for the soak: valid ones of mixed shapes and timesteps with their results, and malformed ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edm_deploy.network.family import SAMPLE, TIMESTEP
from edm_deploy.runtime.denoiser import EngineDenoiser
from edm_deploy.runtime.load import load_denoiser
from edm_deploy.runtime.manifest import ShapeRange

CALLS = 24  # prepared for each engine
SHAPES = 6  # among them; of heights and widths, more than openvino keeps compiled

Inputs = dict[str, Any]  # arguments of a denoiser; those of a malformed call may be anything


@dataclass(frozen=True)
class PreparedCall:
    """Arguments of a call, and what it returned when it was made alone."""

    inputs: Inputs
    expected: Tensor


@dataclass(frozen=True)
class SoakedEngine:
    """An opened engine with its calls.

    Attributes:
        name: Its directory.
        denoiser: The engine.
        closed: A second instance of it, closed.
        calls: Valid calls, those of one shape after each other, so that openvino compiles each shape once for them.
        malformed: Calls that must be refused, by what is wrong with them.
    """

    name: str
    denoiser: EngineDenoiser
    closed: EngineDenoiser
    calls: Sequence[PreparedCall]
    malformed: Mapping[str, Callable[[], Any]]


def soaked_engine(directory: Path, seed: int) -> SoakedEngine:
    """Open an engine twice, close one of them, and compute its calls alone, from random inputs.

    Raises:
        ArtifactError, UnsupportedError: As `load_denoiser`.
    """
    denoiser, closed = (load_denoiser(directory, device="cpu") for _ in range(2))
    closed.close()
    generator = torch.Generator().manual_seed(seed)
    shapes = [shape_of(denoiser, generator, first) for first in (*range(2), *[2] * (SHAPES - 2))]
    arguments = [valid_inputs(denoiser, shapes[number * SHAPES // CALLS], generator) for number in range(CALLS)]
    calls = [PreparedCall(inputs, prediction(denoiser, inputs)) for inputs in arguments]
    return SoakedEngine(str(directory), denoiser, closed, calls, malformed_calls(denoiser, closed, arguments[0]))


def shape_of(denoiser: EngineDenoiser, generator: torch.Generator, number: int) -> dict[str, int]:
    """A size for each dynamic dimension: the smallest of the profile for number 0, the largest for 1, otherwise random ones."""
    multiple = denoiser.family.size_multiple(denoiser.manifest.config)
    sizes = {}
    for dim, allowed in denoiser.manifest.profile.items():
        step = multiple if dim in ("height", "width") else 1
        steps = range(-(-allowed.min // step), allowed.max // step + 1)
        sizes[dim] = step * (steps[0], steps[-1], steps[int(torch.randint(len(steps), (), generator=generator))])[number]
    return sizes


def valid_inputs(denoiser: EngineDenoiser, sizes: Mapping[str, int], generator: torch.Generator) -> Inputs:
    """Random inputs of these sizes, each sample at another timestep."""
    family, manifest = denoiser.family, denoiser.manifest
    drawn = family.random_conditioning(manifest.config, sizes["batch"], generator)
    inputs: Inputs = {}
    for declared in manifest.inputs:
        shape = [sizes[dim] if isinstance(dim, str) else dim for dim in declared.dims]
        if declared.name == SAMPLE:
            inputs[SAMPLE] = torch.randn(shape, generator=generator)
        elif declared.name == TIMESTEP.name:
            inputs[TIMESTEP.name] = torch.randint(manifest.num_train_timesteps, shape, generator=generator)
        else:
            inputs[declared.name] = resized(drawn[declared.name], shape)
    return inputs


def resized(value: Tensor, shape: Sequence[int]) -> Tensor:
    """`value` with each dimension cut or repeated to the size in `shape`."""
    for dim, size in enumerate(shape):
        value = value.index_select(dim, torch.arange(size) % value.shape[dim])
    return value


def malformed_calls(denoiser: EngineDenoiser, closed: EngineDenoiser, valid: Inputs) -> dict[str, Callable[[], Any]]:
    """Calls that must be refused, by what is wrong with them."""
    sample, timestep, last = valid[SAMPLE], valid[TIMESTEP.name], denoiser.manifest.num_train_timesteps
    beyond = denoiser.manifest.profile.get("batch", ShapeRange(1, 1, 1)).max + 1
    changes: dict[str, Inputs] = {
        "another number of channels": {SAMPLE: torch.cat([sample, sample[:, :1]], 1)},
        "a sample without its last dimension": {SAMPLE: sample[..., 0]},
        "a sample that is one number": {SAMPLE: torch.tensor(1.0)},
        "an empty batch": {name: value[:0] for name, value in valid.items()},
        "a batch beyond the profile": {name: resized(value, [beyond, *value.shape[1:]]) for name, value in valid.items()},
        "a sample of integers": {SAMPLE: sample.long()},
        "a sample that is a list": {SAMPLE: sample.tolist()},
        "complex samples": {SAMPLE: torch.complex(sample, sample)},
        "a sample on another device": {SAMPLE: sample.to("meta")},
        "a timestep of NaN": {TIMESTEP.name: timestep * float("nan")},
        "an infinite timestep": {TIMESTEP.name: timestep + float("inf")},
        "a timestep after the schedule": {TIMESTEP.name: timestep * 0 + last + 1},
        "a timestep before the schedule": {TIMESTEP.name: -1},
        "a timestep of text": {TIMESTEP.name: "late"},
        "a timestep of ten thousand digits": {TIMESTEP.name: 10**10_000},
        "a timestep too many": {TIMESTEP.name: torch.arange(len(sample) + 2)},
        "no timestep": {TIMESTEP.name: None},
        "an unknown argument": {"mask_of_nothing": sample},
    }
    for name in sorted(set(valid) - {SAMPLE, TIMESTEP.name}):
        if not valid[name].is_floating_point():
            changes[f"{name} of another type"] = {name: valid[name].float() + 0.5}
            changes[f"{name} below 0"] = {name: valid[name] * 0 - 1}
        changes[f"no {name}"] = {name: None}
        changes[f"{name} with a dimension too many"] = {name: valid[name][..., None]}
    calls: dict[str, Callable[[], Any]] = {what: lambda change=change: denoiser(**valid | change) for what, change in changes.items()}  # type: ignore[misc]
    return calls | {"a closed engine": lambda: closed(**valid)}


def prediction(denoiser: EngineDenoiser, inputs: Inputs) -> Tensor:
    """What a denoiser returns for `inputs`."""
    result: Tensor = denoiser(**inputs, return_dict=False)[0]
    return result
