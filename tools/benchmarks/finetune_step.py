"""What one fine-tuning step costs, against the least that any distillation must pay: teacher forward, float forward, float backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from edm_deploy.pipelines.source import load_source
from edm_deploy_tools.benchmarks.engines import check_counts, conditions
from edm_deploy_tools.benchmarks.step_cost import StepCost, step_cost
from edm_deploy_tools.common.console import Row
from edm_deploy_tools.common.recipe_settings import recipe_with


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """A finished measurement.

    Attributes:
        conditions: What a number needs to mean something: machine, versions, batch, n, date.
        cost: Medians and peaks.
    """

    conditions: Mapping[str, Any]
    cost: StepCost

    def rows(self) -> list[Row]:
        """The float step and the fine-tuning step."""
        cost = self.cost
        measured = (
            ("float step: teacher, forward, backward, fp32", cost.float_seconds, cost.float_peak_bytes),
            ("fine-tuning step: efficientdm", cost.step_seconds, cost.step_peak_bytes),
        )
        return [
            {
                "name": name,
                "median ms": round(1000 * seconds, 1),
                "of the float step": round(seconds / cost.float_seconds, 2),
                "peak GB": round(peak / 1e9, 2) if peak else None,
                "n": cost.repeats,
            }
            for name, seconds, peak in measured
        ]

    def to_json(self) -> dict[str, Any]:
        """Every figure, by name."""
        return {"conditions": dict(self.conditions), "results": self.rows(), "ratio": self.cost.ratio}


def bench_finetune_step(model: str, *, batch: int, rounds: int, threads: int | None = None) -> TrainingCost:
    """Time a step of the `efficientdm` recipe and a step of float distillation in turns, then the peak memory of each in a process of its own.

    Args:
        model: A local diffusers directory or a hub id.
        batch: Samples a step.
        rounds: Measurements of each.
        threads: CPU threads; None is torch's default.

    Raises:
        InputError: A number below 1.
        ArtifactError, UnsupportedError: As load_source.
    """
    check_counts(batch, rounds, threads)
    if threads:
        torch.set_num_threads(threads)
    cost = step_cost(load_source(model), recipe_with("efficientdm"), batch=batch, repeats=rounds)
    return TrainingCost(conditions=conditions(batch, rounds, threads), cost=cost)
