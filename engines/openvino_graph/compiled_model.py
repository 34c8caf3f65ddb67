"""A model that OpenVINO compiled for one set of shapes, with the infer requests of the calls that run at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class CompiledModel:
    """A model compiled for one set of shapes, with its idle infer requests."""

    def __init__(self, ov: Any, compiled: Any, lookups: Mapping[str, tuple[int, ...]]) -> None:
        self.compiled = compiled
        self._ov = ov
        self._lookups = lookups  # shapes [B, 1, ...] of the looked-up scales, by input
        self._idle: list[Slot] = []  # append and pop are atomic

    @contextlib.contextmanager
    def slot(self) -> Iterator[Slot]:
        """A request that no other call uses."""
        try:
            slot = self._idle.pop()
        except IndexError:
            slot = self._new_slot()
        yield slot
        self._idle.append(slot)  # not after an error: what state that leaves a request in is not documented

    def _new_slot(self) -> Slot:
        request = self.compiled.create_infer_request()
        batch = next((shape[0] for shape in self._lookups.values()), 0)
        looked_up = torch.zeros(len(self._lookups), batch)
        for (name, shape), row in zip(self._lookups.items(), looked_up, strict=True):
            request.set_tensor(name, self._ov.Tensor(row.reshape(shape).numpy(), shared_memory=True))
        return Slot(request, looked_up, {})


@dataclass(frozen=True)
class Slot:
    """An infer request and its memory.

    Attributes:
        request: The request.
        looked_up: float32 [S, B], from which the request reads each sample's scales.
        held: Adapter weights that the request reads, by input.
    """

    request: Any
    looked_up: Tensor
    held: dict[str, Tensor]

    def hold(self, ov: Any, weights: Mapping[str, Tensor]) -> None:
        """Let the request read these adapter weights, without copies; those that it reads already cost nothing."""
        for name, value in weights.items():
            if self.held.get(name) is not value:
                self.request.set_tensor(name, ov.Tensor(value.numpy(), shared_memory=True))
                self.held[name] = value
