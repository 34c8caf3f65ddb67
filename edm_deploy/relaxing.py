"""Timesteps at which activations stay in floating point: the second graph with the same weights, and the way of each sample to its graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from edm_deploy.activations import rows_of
from edm_deploy.artifact import Artifact
from edm_deploy.correction import Run
from edm_deploy.family import TIMESTEP
from edm_deploy.reference import Reference

FOLDER = "relaxed"  # in the directory of a graph or an engine: the second one
Spans = tuple[tuple[int, int], ...]  # first and last timestep of each stretch


def graph_part(artifact: Artifact) -> Artifact:
    """What the first graph computes: the artifact without what the runtime does around it."""
    return replace(artifact, relaxed=None, correction=None)


def relaxed_part(artifact: Artifact) -> Artifact:
    """What the second graph computes: the same weights, every input in floating point."""
    sites = {name: replace(site, activation=None) for name, site in artifact.sites.items()}
    return replace(graph_part(artifact), sites=sites, pipeline={})


def whole_reference(artifact: Artifact) -> Run:
    """An artifact as a runtime runs it, by the reference executor: both graphs where it has two, and its correction."""
    runs: list[Run] = [Reference(graph_part(artifact))]
    if artifact.relaxed is not None:
        runs.append(Reference(relaxed_part(artifact)))
    run = by_timestep(runs, artifact.relaxed)
    return run if artifact.correction is None else artifact.correction.around(run)


def by_timestep(runs: Sequence[Run], engine_of_timestep: Tensor | None) -> Run:
    """One function of several: each sample of a batch goes where its timestep belongs, and comes back to its place.

    Args:
        runs: Graphs, by the numbers in the map.
        engine_of_timestep: uint8 [num_train_timesteps]; None sends all to the first.
    """
    if engine_of_timestep is None:
        return runs[0]

    def routed(inputs: Mapping[str, Tensor]) -> Tensor:
        engine = rows_of(engine_of_timestep, inputs[TIMESTEP.name]).cpu()
        chosen = sorted({int(number) for number in engine})
        if len(chosen) == 1:
            return runs[chosen[0]](inputs)
        places, parts = [], []
        for number in chosen:
            members = torch.nonzero(engine == number)[:, 0]
            places.append(members)
            parts.append(runs[number]({name: value[members.to(value.device)] for name, value in inputs.items()}))
        order = torch.cat(places).argsort()
        return torch.cat(parts)[order.to(parts[0].device)]

    return routed


def spans_of(engine_of_timestep: Tensor) -> Spans:
    """The stretches of timesteps that the second graph computes, from uint8 [num_train_timesteps]."""
    flags = torch.cat([torch.zeros(1), (engine_of_timestep > 0).float().cpu(), torch.zeros(1)]).diff()
    starts, ends = torch.nonzero(flags > 0)[:, 0], torch.nonzero(flags < 0)[:, 0] - 1
    return tuple((int(first), int(last)) for first, last in zip(starts, ends, strict=True))


def engines_of(spans: Sequence[Sequence[int]], num_train_timesteps: int) -> Tensor:
    """uint8 [num_train_timesteps], 1 within the stretches: undoes `spans_of`.

    Raises:
        ValueError: A stretch lies outside the schedule.
    """
    chosen = torch.zeros(num_train_timesteps, dtype=torch.uint8)
    for first, last in spans:
        if not 0 <= first <= last < num_train_timesteps:
            raise ValueError(f"timesteps {first} to {last} lie outside a schedule of {num_train_timesteps}")
        chosen[first : last + 1] = 1
    return chosen


def span_words(spans: Sequence[Sequence[int]]) -> str:
    """`timesteps 0 to 199`, for people."""
    return "timesteps " + ", ".join(f"{first} to {last}" for first, last in spans)
