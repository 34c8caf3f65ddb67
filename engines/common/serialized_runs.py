"""Serialize the runs of one GPU session: a lock between host threads, an event between CUDA streams.

A captured CUDA graph and a TensorRT execution context each own one set of buffers, so two runs must not overlap on the host or on the GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch


class SerializedRuns:
    """Order between the runs of one session on a CUDA device: a run starts on the GPU when the run before it has ended, whatever their streams."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._last: Any = None  # torch.cuda.Event at the end of the latest run

    @contextlib.contextmanager
    def next(self) -> Iterator[Any]:
        """Within it, enqueue one run on the stream that is given, torch's current stream of this thread. Does not wait for the GPU."""
        with self._lock, torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            if self._last is not None:
                stream.wait_event(self._last)
            try:
                yield stream
            finally:
                self._last = stream.record_event()

    def finish(self) -> None:
        """Wait until the GPU has ended every run."""
        with self._lock:
            if self._last is not None:
                self._last.synchronize()
