"""Session of a rewritten denoiser: eager on the CPU, on a GPU one CUDA graph per set of input shapes.

Capture and replay have not been executed on a GPU yet; `pytest -m gpu` runs their tests.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edm_deploy.runtime.backend import Session
from engines.common.kept_inputs import KeptInputs
from engines.common.serialized_runs import SerializedRuns

CAPTURED_SHAPES = 4  # graphs kept; all allocate from one memory pool
WARM_UP = 3  # eager runs before a capture: kernels are built and loaded, cuBLAS and cuDNN allocate their workspaces


@dataclass(frozen=True)
class Captured:
    """A CUDA graph with its input and output memory.

    Attributes:
        graph: A replay runs every kernel of one call.
        inputs: By name; each run copies its inputs into them, those that the session keeps apart.
        outputs: By name; the next replay overwrites them.
    """

    graph: Any  # torch.cuda.CUDAGraph, absent from a torch without CUDA
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


class CudaSession(Session):
    """A graph of torch operators and our kernels on one device.

    Table rows are computed in the graph from `timestep`, so a captured graph serves every timestep, and a batch may mix them. Captured graphs share one
    memory pool, so their runs are serialized; eager runs hold no state and overlap.

    Args:
        module: The graph.
        inputs, outputs: Names, in the graph's order.
        device: Where it runs.
        capture: Whether to capture CUDA graphs on a GPU.
        kept: Inputs that are the same tensors from call to call, adapter weights: all captured graphs read one copy, which is renewed when they change.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        inputs: Sequence[str],
        outputs: Sequence[str],
        device: torch.device,
        *,
        capture: bool = True,
        kept: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(device)
        self._module: fx.GraphModule | None = module
        self._runs = SerializedRuns(device)
        self._inputs, self._outputs = tuple(inputs), tuple(outputs)
        self._kept = KeptInputs(kept)
        self._capture = capture and device.type == "cuda"
        self._captured: OrderedDict[tuple[tuple[int, ...], ...], Captured] = OrderedDict()
        self._pool: Any = None

    @torch.no_grad()
    def _infer(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """On a GPU asynchronous, on torch's current stream."""
        if not self._capture:
            return self._eager(inputs)
        with self._runs.next():
            self._kept.renew(inputs)
            captured = self._for_shapes(inputs)
            for name, value in captured.inputs.items():
                if name not in self._kept.names:
                    value.copy_(inputs[name], non_blocking=True)
            captured.graph.replay()
            return {name: value.clone() for name, value in captured.outputs.items()}

    def _release(self) -> None:
        self._runs.finish()
        self._captured.clear()
        self._kept.clear()
        self._module = self._pool = None

    def _eager(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert self._module is not None  # until _release
        ordered = (_channels_last(inputs[name]) for name in self._inputs)
        return dict(zip(self._outputs, self._module(*ordered), strict=True))

    def _for_shapes(self, inputs: Mapping[str, Tensor]) -> Captured:
        """The graph for these shapes, captured at their first use; the least recently used graph is evicted."""
        key = tuple(tuple(inputs[name].shape) for name in self._inputs)
        if key not in self._captured:
            self._captured[key] = self._record(inputs)
            if len(self._captured) > CAPTURED_SHAPES:
                self._captured.popitem(last=False)
        self._captured.move_to_end(key)
        return self._captured[key]

    def _record(self, inputs: Mapping[str, Tensor]) -> Captured:
        static = {name: kept if (kept := self._kept.get(name)) is not None else inputs[name].clone() for name in self._inputs}
        # Source: PyTorch's notes on CUDA graphs, "warm up on a side stream before capture".
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._eager(static)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # thread_local: in mode global, an allocation of any other thread of the process ends the capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            outputs = self._eager(static)
        return Captured(graph, static, outputs)


def _channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
