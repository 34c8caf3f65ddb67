"""What is between our operators, compiled by torch.compile: one kernel for a chain of additions, activations and norms instead of one for each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from edm_deploy.errors import UnsupportedError

Backend = str | Callable[..., Any]


def compiled_rest(module: fx.GraphModule, device: torch.device) -> fx.GraphModule:
    """A rewritten graph compiled as one, with our operators as they are; it is compiled at its first call for each set of input shapes.

    On the CPU, where engines are opened to check their arithmetic, the graph is traced and decomposed in the same way, and run without generated code.

    Raises:
        UnsupportedError: A GPU, and Triton, which inductor writes kernels in, is not installed.
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise UnsupportedError(
            "This engine was built with --rest inductor, which needs Triton, and it is not installed (torch brings it on Linux). "
            "pip install triton, or build again with --rest eager."
        )
    return compiled_by(module, "inductor" if device.type == "cuda" else "aot_eager")


def compiled_by(module: fx.GraphModule, backend: Backend) -> fx.GraphModule:
    """As `compiled_rest`, by a named backend of torch.compile or a function of a graph and its inputs."""
    # Static shapes: a CUDA graph is captured for each anyway, and kernels with constant sizes are faster.
    compiled: Any = torch.compile(module, backend=backend, fullgraph=True, dynamic=False)
    return compiled  # type: ignore[no-any-return]  # a module that calls the compiled one
