"""Select the sites that run in INT4: all whose codes fit, or only those expected to be faster in INT4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.network.layer_costs import model_work
from edm_deploy.runtime.backend import BuildOptions
from edm_deploy.runtime.capabilities import SitePlan
from engines.performance.gpus import Gpu, gpu_named, gpu_names
from engines.performance.roofline import faster_as_int8


@dataclass(frozen=True, kw_only=True)
class Int4Selection:
    """A plan after `--int4-where`.

    Attributes:
        plans: By site.
        as_int8: The sites moved from INT4 to INT8.
        reasons: One sentence of explanation; empty where no site was moved.
    """

    plans: Mapping[str, SitePlan]
    as_int8: frozenset[str] = frozenset()
    reasons: tuple[str, ...] = ()


def select_int4(plans: Mapping[str, SitePlan], artifact: Artifact, options: BuildOptions) -> Int4Selection:
    """The plan according to the build options, for their GPU and their batch to optimize for.

    Raises:
        InputError: `faster` is set, no GPU is named and this machine has none.
        UnsupportedError: There are no figures for the GPU.
    """
    if options.int4_where != "faster":
        return Int4Selection(plans=plans)
    if options.gpu is None and not torch.cuda.is_available():
        raise InputError(
            f"--int4-where faster needs to know the GPU, and there is none here. Name it with --gpu: {', '.join(gpu_names())}."
        )
    return int4_where_faster(plans, artifact, gpu_named(options.gpu or torch.cuda.get_device_name()), options.profile["batch"].opt)


def int4_where_faster(plans: Mapping[str, SitePlan], artifact: Artifact, gpu: Gpu, batch: int) -> Int4Selection:
    """Move to INT8 the sites that are expected to be no faster in INT4. The codes, and so the results, stay the same.

    Args:
        plans: Plans with INT4 wherever the codes fit.
        artifact: The artifact that is built.
        gpu: GPU that the engine will run on.
        batch: Samples per call.
    """
    narrow = {name for name, plan in plans.items() if plan.executed == "int4"}
    work = model_work(artifact.family_object, artifact.config, artifact.structure)
    as_int8 = faster_as_int8({name: site for name, site in work.sites.items() if name in narrow}, gpu, batch)
    chosen = {name: replace(plan, executed="int8", codes="s8") if name in as_int8 else plan for name, plan in plans.items()}
    reason = (
        f"{len(as_int8)} of {len(narrow)} sites whose codes fit 4 bits run as INT8: on {gpu.title} at batch {batch} "
        "they are expected to be no slower so (--int4-where faster)."
    )
    return Int4Selection(plans=chosen, as_int8=as_int8, reasons=(reason,) if as_int8 else ())
