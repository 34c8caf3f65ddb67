"""Route samples to the first or the second graph, that of relaxed timesteps, by timestep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from edm_deploy.artifact.timestep_correction import DenoiseFn
from edm_deploy.errors import ArtifactError
from edm_deploy.network.family import TIMESTEP
from edm_deploy.numerics.activation_table import table_rows

Intervals = tuple[tuple[int, int], ...]  # first and last timestep of each


def route_by_timestep(runs: Sequence[DenoiseFn], engine_of_timestep: Tensor | None) -> DenoiseFn:
    """One denoising function of several graphs: each sample is computed by the graph of its timestep, and the order of the batch is kept.

    Args:
        runs: The graphs.
        engine_of_timestep: uint8 [num_train_timesteps], indices into `runs`; None routes all samples to the first.
    """
    if engine_of_timestep is None:
        return runs[0]

    def routed(inputs: Mapping[str, Tensor]) -> Tensor:
        engine = table_rows(engine_of_timestep, inputs[TIMESTEP.name]).cpu()
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


def intervals_from_mask(engine_of_timestep: Tensor) -> Intervals:
    """The intervals of timesteps that the second graph computes, from a mask uint8 [num_train_timesteps]."""
    flags = torch.cat([torch.zeros(1), (engine_of_timestep > 0).float().cpu(), torch.zeros(1)]).diff()
    starts, ends = torch.nonzero(flags > 0)[:, 0], torch.nonzero(flags < 0)[:, 0] - 1
    return tuple((int(first), int(last)) for first, last in zip(starts, ends, strict=True))


def mask_from_intervals(spans: Sequence[Sequence[int]], num_train_timesteps: int) -> Tensor:
    """uint8 [num_train_timesteps], 1 within the intervals: the inverse of `intervals_from_mask`.

    Raises:
        ArtifactError: As `check_intervals`.
    """
    check_intervals(spans, num_train_timesteps)
    chosen = torch.zeros(num_train_timesteps, dtype=torch.uint8)
    for first, last in spans:
        chosen[first : last + 1] = 1
    return chosen


def check_intervals(spans: Sequence[Sequence[int]], num_train_timesteps: int) -> None:
    """Raises ArtifactError where an interval is outside the schedule, or the intervals do not ascend."""
    free = 0  # the first timestep that is in no interval yet
    for first, last in spans:
        if not 0 <= first <= last < num_train_timesteps:
            raise ArtifactError(
                f"relaxed timesteps {first} to {last} are outside a schedule of {num_train_timesteps}, expected 0 to {num_train_timesteps - 1}."
            )
        if first < free:
            raise ArtifactError(f"relaxed timesteps {first} to {last} overlap an earlier interval, expected ascending ones.")
        free = last + 1


def describe_intervals(spans: Sequence[Sequence[int]]) -> str:
    """Intervals as text, `timesteps 0 to 199`."""
    return "timesteps " + ", ".join(f"{first} to {last}" for first, last in spans)
