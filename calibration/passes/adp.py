"""ADP: the calibrated timesteps are chosen for what they tell, and timesteps that are quantized alike share one table row.

Source: Wang et al., Towards Accurate Post-training Quantization for Diffusion Models, CVPR 2024, arXiv 2305.18723. The paper searches the groups by
gradient; rows that are calibrated already can be clustered outright. The released code (github.com/ChangyuanWang17/APQ-DM at 53c1780) mixes the
groups' ranges by input channel and timestep, which no integer kernel can factor; the paper's groups of timesteps are what is done here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from calibration.base_pass import Pass, PassContext, needs_quantized_inputs, needs_rows
from calibration.data.noise_schedules import calibrated_timesteps
from calibration.data.trajectory_pool import Trajectories
from calibration.observers.kmeans import centroids_of, cluster, memberships, segment
from calibration.observers.observers import MinMaxObserver
from calibration.recipe import Recipe
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError


@dataclass(frozen=True, kw_only=True)
class Adp(Pass):
    """Groups are made where ranges are calibrated, so that a recipe that trains tunes each group's one row.

    Attributes:
        groups: Rows that are left. Source: 8.
        contiguous: Whether a group is one stretch of the schedule. Source: no.
        choose: Whether timesteps are chosen; else they are those of a sampling with as many steps.
        candidates: Timesteps to choose from, evenly over the sampling.
        probes: Trajectories that the choice is made on.
        spread: Weight of the structural term: how well the chosen timesteps stand for all, beside how undecided each is between groups.
    """

    name: ClassVar[str] = "adp"
    groups: int = 8
    contiguous: bool = False
    choose: bool = True
    candidates: int = 100
    probes: int = 4
    spread: float = 1.0

    def __post_init__(self) -> None:
        for name in ("groups", "candidates", "probes"):
            at_least(f"adp.{name}", getattr(self, name), 1)
        at_least("adp.spread", self.spread, 0.0)

    def check(self, recipe: Recipe, others: Sequence[Pass]) -> None:
        """Refuse recipes without ranges, with fewer rows than groups, or with more than there are candidates."""
        needs_quantized_inputs(self, recipe)
        needs_rows(self, recipe, self.groups)
        if self.choose and recipe.rows > self.candidates:
            raise InputError(
                f"adp.candidates is {self.candidates}, fewer than the {recipe.rows} rows to choose. Set more candidates, or fewer rows."
            )

    def timesteps(self, context: PassContext) -> Tensor | None:
        """The chosen timesteps; the noisiest is always among them, because trajectories start there."""
        if not self.choose:
            return None
        candidates = calibrated_timesteps(context.source.scheduler, self.candidates, context.source.family_object.sigmas(self.candidates))
        if context.recipe.rows > len(candidates):
            return None  # some fell together when they were rounded to whole timesteps
        features = _ranges_along(context, candidates, self.probes)
        groups = segment(features, self.groups) if self.contiguous else cluster(features, self.groups)
        chosen = select(uncertainty(features, groups), similarity(features, groups), context.recipe.rows, self.spread, len(candidates) - 1)
        return candidates[chosen]

    def before(self, student: Student, context: PassContext) -> None:
        """Make room for the groups, which a resumed run brings with it."""
        student.shared_row = nn.Parameter(torch.arange(len(student.timesteps), dtype=torch.int32), requires_grad=False)

    @torch.no_grad()
    def calibrated(self, student: Student, context: PassContext) -> None:
        """Cluster the rows by what they are at all sites together; the first row of a group is the one that it shares."""
        columns = [part for quantizer in student.quantizers.values() for part in (quantizer.log_scale, quantizer.qmin / quantizer.levels)]
        rows = torch.stack([column.detach().cpu() for column in columns], dim=1)
        groups = segment(rows, self.groups) if self.contiguous else cluster(rows, self.groups)
        shared = torch.stack([torch.nonzero(groups == group)[0, 0] for group in groups])
        assert student.shared_row is not None  # made before
        student.shared_row.copy_(shared)
        for quantizer in student.quantizers.values():
            for column in (quantizer.log_scale, quantizer.qmin):
                means = centroids_of(column.detach().cpu()[:, None], groups)[groups, 0]
                column.copy_(means if column is quantizer.log_scale else means.round())

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with one table row a group."""
        assert student.shared_row is not None  # made before
        return keep_rows(artifact, student.shared_row.detach().cpu())


PASS = Adp


def keep_rows(artifact: Artifact, shared: Tensor) -> Artifact:
    """The artifact with those rows alone that others share.

    Args:
        artifact: R rows.
        shared: int [R], for each row the one that stands for it, which stands for itself.
    """
    kept, position = torch.unique(shared.long(), return_inverse=True)
    sites = {}
    for name, site in artifact.sites.items():
        table = site.activation
        if table is not None:
            table = replace(table, scale=table.scale[kept], qmin=table.qmin[kept], qmax=table.qmax[kept])
        sites[name] = replace(site, activation=table)
    row_of_timestep = position[artifact.row_of_timestep.long()].to(torch.int32)
    return replace(artifact, timesteps=artifact.timesteps[kept], row_of_timestep=row_of_timestep, sites=sites)


def uncertainty(features: Tensor, groups: Tensor) -> Tensor:
    """How undecided each timestep is between the groups: the entropy of its memberships, 0 to 1, float [T].

    Source: arXiv 2305.18723, the entropy of the importance weights.
    """
    shares = memberships(features, groups)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1)
    return entropy / math.log(max(shares.shape[1], 2))


def similarity(features: Tensor, groups: Tensor) -> Tensor:
    """Gaussian kernel between timesteps, as wide as timesteps of one group are apart: float [T, T], 1 on the diagonal."""
    apart = torch.cdist(features, features).square()
    together = groups[:, None] == groups[None, :]
    width = apart[together].mean().clamp(min=torch.finfo(apart.dtype).tiny)
    return (-apart / (2 * width)).exp()


def select(gain: Tensor, alike: Tensor, count: int, spread: float, first: int) -> Tensor:
    """Timesteps picked one by one for the largest `gain + spread (mean similarity to all - mean similarity to those picked)`.

    The second term is what one more pick takes off the distance between the picked and all (maximum mean discrepancy): the structural risk that
    keeps the first, empirical one from being read off a few timesteps.

    Args:
        gain: float [T].
        alike: float [T, T].
        count: How many, at most T.
        spread: Weight of the second term.
        first: Picked whatever it scores.

    Returns:
        int64 [count], ascending.

    Source: arXiv 2305.18723, structural risk minimisation with maximum mean discrepancy.
    """
    picked = [first]
    while len(picked) < count:
        score = gain + spread * (alike.mean(1) - alike[:, picked].mean(1))
        score[picked] = -math.inf
        picked.append(int(score.argmax()))
    return torch.tensor(sorted(picked))


def _ranges_along(context: PassContext, timesteps: Tensor, samples: int) -> Tensor:
    """What every site's range would be at each timestep: log of its width, and where 0 lies in it. float [T, 2 sites]."""
    recipe, teacher = context.recipe, Teacher(context.source, context.device)
    extremes = {name: MinMaxObserver() for name in teacher.family.sites(teacher.model)}
    handles = [layer.register_forward_pre_hook(extremes[name]) for name, layer in teacher.family.sites(teacher.model).items()]
    trajectories = Trajectories(
        context.source, timesteps, size=samples, eta=recipe.eta, seed=recipe.seed, device=context.device, conditioner=context.conditioner
    )
    features = torch.zeros(len(timesteps), 2 * len(extremes))
    try:
        for row, batches in trajectories.sweep(samples):
            for batch in batches:
                trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))
            low, high = torch.tensor([seen.take() for seen in extremes.values()]).T
            width = (high - low).clamp(min=1e-12)
            features[row] = torch.cat([width.log(), low / width])
    finally:
        for handle in handles:
            handle.remove()
    return features
