"""Peak memory of a run: estimate and measurement."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_BASE = 1_000_000_000  # bytes of libraries and of activations at usual sample sizes


def needed_memory(parameters: int, *, trains: bool, low_memory: bool = False, rotates: bool = False, cached: int = 0) -> int:
    """Estimated bytes of memory for quantizing a model on the CPU, rounded up.

    Four bytes per parameter for the float weights (none if they stay in their files), and one and a half for codes and the temporaries of one
    layer. Training adds a bfloat16 teacher and, for the backward pass, the merged and the rounded weights: 12 bytes. Rotated
    weights are a second copy in float32: 4 bytes.

    Args:
        parameters: Number of parameters of the denoiser.
        trains: Whether the recipe trains.
        low_memory: Whether the float weights stay in their files.
        rotates: Whether the recipe rotates weights.
        cached: Maximum bytes of activations that the recipe caches.
    """
    per_parameter = (0.0 if low_memory else 4.0) + 1.5 + (12.0 if trains else 0.0) + (4.0 if rotates else 0.0)
    return _BASE + cached + int(per_parameter * parameters)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the accelerator's allocator, or of this process if the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # not ru_maxrss: on Linux a new process inherits that of its parent
        return next(int(line.split()[1]) for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM")) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
