"""Share of an artifact's work that each kind of arithmetic does, by timestep and backend."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.artifact.relaxed_timesteps import quantized_graph, relaxed_graph
from edm_deploy.artifact.timestep_routing import describe_intervals, intervals_from_mask
from edm_deploy.network.layer_costs import SiteWork
from edm_deploy.runtime.capabilities import CAPABILITIES, BackendCapabilities, plan_layers
from edm_deploy_tools.common.console import Row


def work_by_step(artifact: Artifact, work: Mapping[str, SiteWork]) -> list[Row]:
    """One row for each graph and backend: its timesteps, and the percentage of the multiply-accumulates of all layers in INT4, INT8 and floating point.

    Layers that are no sites count as floating point; the two products of attention are not counted.

    Args:
        artifact: With one graph, or two where it has relaxed timesteps.
        work: Of every layer by name, as `model_work` gives it.
    """
    relaxed = torch.zeros(artifact.num_train_timesteps, dtype=torch.uint8) if artifact.relaxed is None else artifact.relaxed
    graphs = [(quantized_graph(artifact), 1 - relaxed)]
    if artifact.relaxed is not None:
        graphs.append((relaxed_graph(artifact), relaxed))
    return [
        {"timesteps": describe_intervals(intervals_from_mask(mask)).removeprefix("timesteps "), "backend": name}
        | shares(graph, work, target)
        for graph, mask in graphs
        for name, target in CAPABILITIES.items()
    ]


def shares(graph: Artifact, work: Mapping[str, SiteWork], target: BackendCapabilities) -> Row:
    """Percentages of the multiply-accumulates of all layers, by arithmetic. A weight-only site multiplies in floating point."""
    total = sum(site.macs for site in work.values())
    done = {"int4": 0, "int8": 0}
    for name, plan in plan_layers(graph, target).items():
        if plan.executed in done:
            done[plan.executed] += work[name].macs
    percent = {name: round(100 * macs / total, 1) for name, macs in done.items()}
    return {"INT4 %": percent["int4"], "INT8 %": percent["int8"], "float %": round(100 - sum(percent.values()), 1)}
