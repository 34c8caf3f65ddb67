"""Describe a float model from its config alone: layers, shapes, multiply-accumulates, plans and expected sizes. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from edm_deploy.errors import ArtifactError, UnsupportedError
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.layer_costs import ModelWork, model_work
from edm_deploy.network.meta_model import meta_model
from edm_deploy.pipelines.model_index import PipelineConfig, read_pipeline_config
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.pipelines.source import local_directory
from edm_deploy.registry import suggestion
from edm_deploy.runtime.capabilities import CAPABILITIES, summary
from edm_deploy.storage.directories import INDEX_FILE, SCHEDULER_FILE
from edm_deploy_tools.common.console import Row, size_words
from edm_deploy_tools.inspection import architectures, estimates


def pipeline_config_of(name: str) -> PipelineConfig:
    """Config of a local diffusers directory, a hub id, or an architecture by its name (`sd15`).

    Raises:
        ArtifactError: It does not exist.
        UnsupportedError: There is no family for it.
    """
    if is_architecture(name):
        return pipeline_config_of_architecture(architectures.architecture(name))
    if "/" not in name and not Path(name).exists():
        known = architectures.names()
        raise ArtifactError(
            f"{name} does not exist; expected a directory, a hub id such as google/ddpm-cifar10-32, or an architecture."
            f"{suggestion(name.lower(), known)} Architectures: {', '.join(known)}."
        )
    return read_pipeline_config(local_directory(name, weights=False), name)


def is_architecture(name: str) -> bool:
    """Whether this is the name of a published architecture and no path of that name exists."""
    return name in architectures.names() and not Path(name).exists()


def pipeline_config_of_architecture(described: architectures.Architecture) -> PipelineConfig:
    """Config of a pipeline with this architecture.

    Raises:
        UnsupportedError: There is no family for it.
    """
    family = name_of_family(described.class_name)
    component = family_named(family).component
    index = {
        "_class_name": described.pipeline_class,
        component: ["diffusers", described.class_name],
        "scheduler": ["diffusers", described.scheduler_class],
    }
    scheduler = {"_class_name": described.scheduler_class, **described.scheduler_config}
    return PipelineConfig(
        name=described.title,
        family=family,
        component=component,
        config=described.config,
        scheduler_class=described.scheduler_class,
        pipeline={INDEX_FILE: index, SCHEDULER_FILE: scheduler},
    )


def facts_of(pipeline: PipelineConfig, work: ModelWork) -> dict[str, Any]:
    """Facts of the model, by name."""
    family = pipeline.family_object
    placements = [family.placement(name) for name in work.sites]
    weights = sum(site.weights for site in work.sites.values())
    scheduler = scheduler_from_config(pipeline.scheduler_class, pipeline.scheduler_config)
    predicts = scheduler.config.get("prediction_type", "velocity" if "FlowMatch" in pipeline.scheduler_class else "epsilon")
    guidance = family.guidance(pipeline.config)
    return {
        "kind": "diffusers model",
        "name": pipeline.name,
        "family": f"{pipeline.family} ({family.class_name})",
        "parameters": f"{work.parameters:,}",
        "size": f"{size_words(2 * work.parameters)} in float16, {size_words(4 * work.parameters)} in float32",
        "sites": f"{len(placements)}: {placements.count('quantize')} quantized, {placements.count('w8a8')} kept at W8A8",
        "in the sites": f"{100 * weights / work.parameters:.1f} % of the parameters",
        "sample": "x".join(map(str, family.sample_shape(pipeline.config))),
        "guidance": guidance.kind if guidance.kind == "none" else f"{guidance.kind}, usually {guidance.scale:g}",
        "MACs a sample": f"{sum(site.macs for site in work.sites.values()) / 1e9:.3f} G in the sites, {work.other_macs / 1e9:.3f} G outside",
        "calibration needs": f"{size_words(4 * work.parameters)} for float32 weights, and {size_words(work.activation_bytes)} for each sample of a batch",
        "scheduler": f"{pipeline.scheduler_class}, {scheduler.config.num_train_timesteps} timesteps, predicts {predicts}",
    }


def site_rows(pipeline: PipelineConfig, work: ModelWork, layers: estimates.Layers) -> list[Row]:
    """One row for each site, in the model's order."""
    family = pipeline.family_object
    share = estimates.by_site(work.sites)
    return [
        {
            "site": name,
            "op": "conv2d" if isinstance(layers[name], nn.Conv2d) else "linear",
            "group": family.group(name),
            "placement": family.placement(name),
            "weight": "x".join(map(str, layers[name].weight.shape)),
            "parameters": site.weights,
            "positions": site.outputs_at,
            "MACs": site.macs,
            "MACs %": share[name],
        }
        for name, site in work.sites.items()
    ]


def kept_rows(pipeline: PipelineConfig, model: nn.Module) -> list[Row]:
    """Layers that do not get the recipe's bits, by the reason that the family gives."""
    family = pipeline.family_object
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    counts = Counter(rule for name in names if (rule := family.rule(name)).placement != "quantize")
    words = {"w8a8": "W8A8", "float": "float"}
    return [{"layers": count, "kept": words[rule.placement], "because": rule.reason} for rule, count in counts.items()]


def plan_rows(pipeline: PipelineConfig, work: ModelWork, layers: estimates.Layers) -> list[Row]:
    """Plan of each backend for each scheme, and the size of its constants."""
    family = pipeline.family_object
    rows: list[Row] = []
    for scheme in estimates.SCHEMES:
        for target in CAPABILITIES.values():
            row = {"scheme": scheme.name, "backend": target.backend}
            try:
                plans = estimates.planned(family, layers, scheme, target)
            except UnsupportedError as err:
                rows.append(row | {"engine": None, "plan": f"refused: {err}"})
                continue
            size = estimates.engine_bytes(family, work, scheme, target, plans)
            rows.append(row | {"engine": size_words(size), "plan": summary(plans)})
    return rows


def size_rows(pipeline: PipelineConfig, work: ModelWork) -> list[Row]:
    """Expected size of an artifact of each scheme, from all other parameters in float16 to all in float32."""
    half = 2 * work.parameters
    rows: list[Row] = []
    for scheme in estimates.SCHEMES:
        least, most = (estimates.artifact_bytes(pipeline.family_object, work, scheme, rest_bytes=size) for size in (2, 4))
        rows.append(
            {
                "scheme": scheme.name,
                "artifact": size_words(least) if size_words(least) == size_words(most) else f"{size_words(least)} to {size_words(most)}",
                "bytes": least,
                "of float16": round(least / half, 3),
            }
        )
    return rows


def tables_of(pipeline: PipelineConfig, work: ModelWork) -> Mapping[str, list[Row]]:
    """All tables, by title."""
    family = pipeline.family_object
    model = meta_model(family, pipeline.config)
    layers = family.sites(model)
    tables = {
        "Shares": estimates.shares(family, work),
        "Sites": site_rows(pipeline, work, layers),
        "Kept": kept_rows(pipeline, model),
        f"Expected artifact ({estimates.ROWS} rows)": size_rows(pipeline, work),
        "Expected engine": plan_rows(pipeline, work, layers),
    }
    return {title: rows for title, rows in tables.items() if rows}


def work_of(pipeline: PipelineConfig) -> ModelWork:
    """Multiply-accumulates of the model; see `edm_deploy.network.layer_costs.model_work`."""
    return model_work(pipeline.family_object, pipeline.config)
