"""Runs of an ONNX Runtime session on inputs and outputs at fixed addresses, as the replay of a CUDA graph needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import UnsupportedError
from edm_deploy.runtime.manifest import Manifest
from engines.nvidia.ort_providers import sizes

TORCH_TYPES: Mapping[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}


class FixedBuffers:
    """One buffer for each input and output of a session, bound once. Inputs are copied in, outputs are copied out.

    All runs are in one thread of this object, one after the other, whichever threads call: ONNX Runtime keeps a captured graph by thread, and does not support
    runs of one session from several threads while it captures.
    Source: onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, "Using CUDA Graphs".

    Args:
        session: An InferenceSession whose dimensions are all fixed.
        manifest: Of the engine; its profile has one size of each dimension.
        device: Of the buffers.

    Raises:
        UnsupportedError: ONNX Runtime does not state the shape of an output.
    """

    def __init__(self, session: Any, manifest: Manifest, device: torch.device) -> None:
        self._session, self._device = session, device
        self._inputs = {
            declared.name: torch.zeros(
                sizes(declared.dims, manifest.profile, "opt"), dtype=declared.dtype(manifest.torch_dtype), device=device
            )
            for declared in manifest.graph_inputs
        }
        described = {entry.name: entry for entry in session.get_outputs()}
        self._outputs = {
            name: torch.zeros(_fixed_shape(name, described[name].shape), dtype=TORCH_TYPES[described[name].type], device=device)
            for name in manifest.outputs
        }
        self._binding = session.io_binding()
        for name, value in self._inputs.items():
            self._binding.bind_input(*_address(name, value))
        for name, value in self._outputs.items():
            self._binding.bind_output(*_address(name, value))
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="onnxruntime")

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name, in tensors of their own, of inputs of the fixed shapes."""
        self._wait()  # the inputs may still be computed on a stream of this thread
        return self._thread.submit(self._run, inputs).result()

    def close(self) -> None:
        """End the thread and drop the buffers."""
        self._thread.shutdown()
        self._session = self._binding = None
        self._inputs, self._outputs = {}, {}

    @torch.inference_mode()
    def _run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        for name, buffer in self._inputs.items():
            buffer.copy_(inputs[name])
        self._wait()  # ONNX Runtime runs on another stream, and has ended when it returns
        self._session.run_with_iobinding(self._binding)
        results = {name: buffer.clone() for name, buffer in self._outputs.items()}
        self._wait()  # before the next run overwrites the buffers
        return results

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _fixed_shape(name: str, shape: Sequence[int | str | None]) -> list[int]:
    if not all(isinstance(size, int) for size in shape):
        raise UnsupportedError(
            f"CUDA graphs need fixed shapes, and ONNX Runtime does not state that of output {name!r} ({list(shape)}). Build without --cuda-graphs."
        )
    return [size for size in shape if isinstance(size, int)]


def _address(name: str, value: Tensor) -> tuple[Any, ...]:
    """Arguments of `bind_input` and `bind_output`."""
    element = torch.zeros(0, dtype=value.dtype).numpy().dtype.type
    return name, value.device.type, value.device.index or 0, element, tuple(value.shape), value.data_ptr()
