"""How a stage of `bench_gpu` runs, and what it returns."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from edm_deploy_tools.benchmarks.kernel_problems import Call, graph_seconds
from edm_deploy_tools.common.console import Row
from engines.performance.gpus import Gpu


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """How a stage runs.

    Attributes:
        device: A GPU, or the CPU with the operators' twins, where times mean nothing.
        gpu: Figures of the GPU for expected times; None where they are not known.
        small: Sizes of a dry run.
        replays: Replays of a CUDA graph that a time is the median of.
    """

    device: torch.device
    gpu: Gpu | None = None
    small: bool = False
    replays: int = 20

    def seconds(self, call: Call) -> float:
        """Time of one call, without host time on a GPU."""
        if self.device.type == "cuda":
            return graph_seconds([call], self.replays)
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a stage found.

    Attributes:
        facts: By name.
        tables: Rows by title.
        problems: What is wrong, one sentence each.
        points: Measured layers as in engines/profiles/measured.toml, with expected and measured seconds.
    """

    facts: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
