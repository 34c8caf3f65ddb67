"""Session of a rewritten denoiser on the CPU: one recording per set of input shapes, as a CUDA graph is on a GPU."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from edm_deploy.errors import InputError
from edm_deploy.runtime.backend import Session
from engines.common.kept_inputs import KeptInputs
from engines.kernels.cpu.weights import Weights
from engines.torch_graph.recorded_graph import RecordedGraph

RECORDED_SHAPES = 8  # recordings kept; each has its own memory for the values between the layers, all read one set of weights


class RecordedSession(Session):
    """A graph of torch operators and our kernels for CPUs.

    Table rows are computed in the graph from `timestep`, so a recording serves every timestep, and a batch may mix them. A recording computes in memory that
    stays, so runs are serialized: a run of one call uses all threads, and calls of other threads wait for it.

    Args:
        module: The graph, its tensors on the CPU.
        inputs, outputs: Names, in the graph's order.
        device: The CPU.
        threads: Of the kernels. What torch computes between them uses torch's threads.
        kept: Inputs that are the same tensors from call to call, adapter weights: all recordings read one copy, which is renewed when they change.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: torch.device,
        *,
        threads: int,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(device)
        self._module: fx.GraphModule | None = module
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._threads = threads
        self._process = os.getpid()
        self._kept = KeptInputs(kept)
        self._kept_places = frozenset(place for place, name in enumerate(self._inputs) if name in kept)
        self._weights: Weights | None = Weights()
        self._recorded: OrderedDict[tuple[tuple[int, ...], ...], RecordedGraph] = OrderedDict()
        self._lock = threading.Lock()

    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if os.getpid() != self._process and self._threads > 1:
            raise InputError(
                f"This engine was opened in process {self._process}, of which this process is a fork, and OpenMP's threads do not exist here. "
                "Start workers by spawn and open the engine in each, or build it with --threads 1."
            )
        with self._lock:
            # A recording's memory is made in inference mode, and may be written in that mode only; outputs are ordinary tensors whatever the caller's mode.
            with torch.inference_mode():
                self._kept.renew(inputs)
                found = self._run([inputs[name] if (kept := self._kept.get(name)) is None else kept for name in self._inputs])
            with torch.inference_mode(False), torch.no_grad():
                return {name: value.clone(memory_format=torch.contiguous_format) for name, value in zip(self._outputs, found, strict=True)}

    def _release(self) -> None:
        with self._lock:
            self._recorded.clear()
            self._kept.clear()
            self._module = self._weights = None

    def _run(self, values: Sequence[Tensor]) -> Sequence[Tensor]:
        """Outputs of the recording for these shapes, recorded at their first use; the least recently used recording is evicted."""
        key = tuple(tuple(value.shape) for value in values)
        if (recording := self._recorded.get(key)) is not None:
            self._recorded.move_to_end(key)
            outputs: Sequence[Tensor] = recording.run(values)
            return outputs
        assert self._module is not None and self._weights is not None  # until _release
        if len(self._recorded) == RECORDED_SHAPES:
            self._recorded.popitem(last=False)  # before its successor takes memory
        self._recorded[key] = recording = RecordedGraph(self._module, values, self._weights, self._threads, self._kept_places)
        return tuple(recording.outputs)
