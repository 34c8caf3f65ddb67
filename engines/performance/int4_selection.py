"""Which sites run in INT4: every one whose codes fit, or only those that are expected to be faster for it."""

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
    """What `--int4-where faster` makes of a plan.

    Attributes:
        plans: By site.
        as_int8: The sites that it moved from INT4 to INT8.
        reasons: Why, a sentence; none where it moved none.
    """

    plans: Mapping[str, SitePlan]
    as_int8: frozenset[str] = frozenset()
    reasons: tuple[str, ...] = ()


def select_int4(plans: Mapping[str, SitePlan], artifact: Artifact, options: BuildOptions) -> Int4Selection:
    """The plan that a build's options ask for, for the GPU and the usual batch that they name.

    Raises:
        InputError: `faster` is asked for, and neither a GPU is named nor is one here.
        UnsupportedError: The GPU's figures are not known.
    """
    if options.int4_where != "faster":
        return Int4Selection(plans=plans)
    if options.gpu is None and not torch.cuda.is_available():
        raise InputError(
            f"--int4-where faster needs to know the GPU, and there is none here. Name it with --gpu: {', '.join(gpu_names())}."
        )
    return int4_where_faster(plans, artifact, gpu_named(options.gpu or torch.cuda.get_device_name()), options.profile["batch"].opt)


def int4_where_faster(plans: Mapping[str, SitePlan], artifact: Artifact, gpu: Gpu, batch: int) -> Int4Selection:
    """Move to INT8 what is expected to be no faster in INT4. Every code stays the same, and so does what is computed.

    Args:
        plans: With INT4 wherever the codes fit.
        artifact: What is built.
        gpu: Where it shall run.
        batch: Samples a call.
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
