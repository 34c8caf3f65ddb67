"""What a float model would become, said from its config alone: layers, shapes, work, plans and expected sizes. No weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.models import family_named, name_of_family
from edm_deploy.network.family import meta_model
from edm_deploy.network.layer_costs import ModelWork, model_work
from edm_deploy.pipelines.model_index import INDEX, PipelineConfig, read_pipeline_config
from edm_deploy.pipelines.schedulers import scheduler_from_config
from edm_deploy.pipelines.source import local_directory
from edm_deploy.runtime.capabilities import CAPABILITIES, summary
from edm_deploy_tools.common.console import Row, size_words
from edm_deploy_tools.inspection import architectures, estimates


def outline_of(name: str) -> PipelineConfig:
    """The outline of a local diffusers directory, a hub id, or an architecture by its name (`sd15`).

    Raises:
        ArtifactError: Nothing there.
        UnsupportedError: No family answers for it.
    """
    if is_architecture(name):
        return outline_of_architecture(architectures.architecture(name))
    return read_pipeline_config(local_directory(name, weights=False), name)


def is_architecture(name: str) -> bool:
    """Whether this is the name of a published architecture, and no directory stands there."""
    return name in architectures.names() and not Path(name).exists()


def outline_of_architecture(described: architectures.Architecture) -> PipelineConfig:
    """What a pipeline of this architecture would say of itself.

    Raises:
        UnsupportedError: No family answers for it.
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
        pipeline={INDEX: index, "scheduler/scheduler_config.json": scheduler},
    )


def facts_of(outline: PipelineConfig, work: ModelWork) -> dict[str, Any]:
    """Name and value of what there is to say in a line each."""
    family = outline.family_object
    placements = [family.placement(name) for name in work.sites]
    weights = sum(site.weights for site in work.sites.values())
    scheduler = scheduler_from_config(outline.scheduler_class, outline.scheduler_config)
    predicts = scheduler.config.get("prediction_type", "velocity" if "FlowMatch" in outline.scheduler_class else "epsilon")
    guidance = family.guidance(outline.config)
    return {
        "kind": "diffusers model",
        "name": outline.name,
        "family": f"{outline.family} ({family.class_name})",
        "parameters": f"{work.parameters:,}",
        "size": f"{size_words(2 * work.parameters)} in float16, {size_words(4 * work.parameters)} in float32",
        "sites": f"{len(placements)}: {placements.count('quantize')} quantized, {placements.count('w8a8')} kept at W8A8",
        "in the sites": f"{100 * weights / work.parameters:.1f} % of the parameters",
        "sample": "x".join(map(str, family.sample_shape(outline.config))),
        "guidance": guidance.kind if guidance.kind == "none" else f"{guidance.kind}, usually {guidance.scale:g}",
        "MACs a sample": f"{sum(site.macs for site in work.sites.values()) / 1e9:.3f} G in the sites, {work.other_macs / 1e9:.3f} G outside",
        "calibration needs": f"{size_words(4 * work.parameters)} for float32 weights, and {size_words(work.activation_bytes)} for each sample of a batch",
        "scheduler": f"{outline.scheduler_class}, {scheduler.config.num_train_timesteps} timesteps, predicts {predicts}",
    }


def site_rows(outline: PipelineConfig, work: ModelWork, layers: estimates.Layers) -> list[Row]:
    """A line for each site, in the model's order."""
    family = outline.family_object
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


def kept_rows(outline: PipelineConfig, model: nn.Module) -> list[Row]:
    """The layers that are not quantized like the rest, by the reason that the family gives."""
    family = outline.family_object
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    counts = Counter(rule for name in names if (rule := family.rule(name)).placement != "quantize")
    words = {"w8a8": "W8A8", "float": "float"}
    return [{"layers": count, "kept": words[rule.placement], "because": rule.reason} for rule, count in counts.items()]


def plan_rows(outline: PipelineConfig, work: ModelWork, layers: estimates.Layers) -> list[Row]:
    """What each backend would make of each scheme, and how large its constants would be."""
    family = outline.family_object
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


def size_rows(outline: PipelineConfig, work: ModelWork) -> list[Row]:
    """Expected size of an artifact of each scheme, its other parameters exact in float16 or not."""
    half = 2 * work.parameters
    rows: list[Row] = []
    for scheme in estimates.SCHEMES:
        least, most = (estimates.artifact_bytes(outline.family_object, work, scheme, rest_bytes=size) for size in (2, 4))
        rows.append(
            {
                "scheme": scheme.name,
                "artifact": size_words(least) if size_words(least) == size_words(most) else f"{size_words(least)} to {size_words(most)}",
                "bytes": least,
                "of float16": round(least / half, 3),
            }
        )
    return rows


def tables_of(outline: PipelineConfig, work: ModelWork) -> Mapping[str, list[Row]]:
    """Every table, by title."""
    family = outline.family_object
    model = meta_model(family, outline.config)
    layers = family.sites(model)
    tables = {
        "Shares": estimates.shares(family, work),
        "Sites": site_rows(outline, work, layers),
        "Kept": kept_rows(outline, model),
        f"Expected artifact ({estimates.ROWS} rows)": size_rows(outline, work),
        "Expected engine": plan_rows(outline, work, layers),
    }
    return {title: rows for title, rows in tables.items() if rows}


def work_of(outline: PipelineConfig) -> ModelWork:
    """`edm_deploy.network.layer_costs.model_work` of an outline."""
    return model_work(outline.family_object, outline.config)
