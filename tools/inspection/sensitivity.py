"""Describe what the bits of each site of a float model do to its prediction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from calibration.base_pass import PassContext, measuring_run
from calibration.data.prompts import prompts_of
from calibration.observers.sensitivity import Sensitivity, groups_to_raise
from calibration.passes.allocate import Allocate
from calibration.recipes.mse import Mse
from edm_deploy.errors import InputError
from edm_deploy.network.family import Family
from edm_deploy.network.layer_costs import SiteWork, model_work
from edm_deploy.pipelines.prompt_encoding import conditioner_of
from edm_deploy.pipelines.source import load_source
from edm_deploy_tools.common.console import Row, progress
from edm_deploy_tools.inspection.describe import Description

RECIPE = Mse(weight_bits=4, act_bits=4)


def with_sensitivity(description: Description, model: str) -> Description:
    """The description of a model with the table `Sensitivity`, the sites of most gain for their work first.

    Raises:
        InputError: The description is not of a model.
        ArtifactError, UnsupportedError: As `load_source`.
    """
    if description.kind != "model":
        raise InputError(f"--sensitivity measures a float model, and {model} is an {description.kind}. Name the model, or leave it out.")
    source = load_source(model)
    with progress() as show:
        context = PassContext(
            source=source,
            recipe=RECIPE,
            conditioner=conditioner_of(source, prompts=prompts_of(None)),
            device=torch.device("cpu"),
            run=replace(measuring_run(), on_progress=show),
        )
        family = source.family_object
        planned = {name: RECIPE.layer_spec(name, family.placement(name)) for name in family.sites(source.model)}
        groups = groups_to_raise(context, planned)
        measured = {act: Allocate(weights=not act).measure(context, planned, groups) for act in (True, False)}
    rows = sensitivity_rows(measured[True], measured[False], family, model_work(family, source.config).sites)
    return replace(description, tables={**description.tables, "Sensitivity": rows})


def sensitivity_rows(inputs: Sequence[Sensitivity], both: Sequence[Sensitivity], family: Family, work: Mapping[str, SiteWork]) -> list[Row]:
    """One row for each group of sites: share of the work, and share of the W4A4 error that W4A8 and W8A8 remove, also for each percent of the work.

    Args:
        inputs: With inputs raised.
        both: With weights raised too, in the same order.
        family: Gives each site its layer group.
        work: Of every site.
    """
    total = sum(site.macs for site in work.values())
    rows: list[Row] = []
    for narrow, wide in zip(inputs, both, strict=True):
        macs = 100 * sum(work[site].macs for site in narrow.sites) / total
        gain = 100 * (wide.error - wide.raised_error) / wide.error
        rows.append(
            {
                "sites": narrow.sites[0] + (f" and {len(narrow.sites) - 1} that share its input" if narrow.sites[1:] else ""),
                "group": family.group(narrow.sites[0]),
                "MACs %": round(macs, 2),
                "W4A8 gains %": round(100 * (narrow.error - narrow.raised_error) / narrow.error, 2),
                "W8A8 gains %": round(gain, 2),
                "a percent of MACs": round(gain / macs, 2) if macs else None,
            }
        )
    return sorted(rows, key=lambda row: -(row["a percent of MACs"] or 0.0))
