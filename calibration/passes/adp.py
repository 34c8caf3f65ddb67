"""ADP: the calibrated timesteps are chosen by information, and timesteps with similar quantization parameters share one table row.

Source: Wang et al., Towards Accurate Post-training Quantization for Diffusion Models, CVPR 2024, arXiv 2305.18723. The paper searches the groups by
gradient; calibrated rows can be clustered directly. The released code (github.com/ChangyuanWang17/APQ-DM at 53c1780) mixes the groups' ranges by
input channel and timestep, which no integer kernel can factor; the paper's groups of timesteps are implemented here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from calibration.base_pass import Pass, PassContext, needs_quantized_inputs, needs_rows
from calibration.data.observation import ActivationSamples
from calibration.data.trajectory_pool import FORWARD_BATCH, Trajectories
from calibration.observers.calibrate import input_hook
from calibration.observers.kmeans import cluster, memberships, segment
from calibration.observers.observers import MinMaxObserver, Observer
from calibration.recipe import Recipe
from calibration.run.parallel_map import parallel_map
from calibration.run.setting_checks import at_least
from calibration.student.module_outputs import input_hooks
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps


@dataclass(frozen=True, kw_only=True)
class Adp(Pass):
    """Groups are formed after calibration, so that a recipe that trains tunes one row per group.

    The rows are clustered by their own ranges. The range of a group is then searched again by the recipe, on the inputs of all of its rows together, which are
    observed in a second traversal of the schedule. On the reference model (`mse`, W4A4, 20 rows in 8 groups, 16 images of each of the seeds 123, 1 and 2) the
    PSNR is 22.3, 25.0, 24.1 dB so, and 22.6, 24.9, 24.4 dB with the means of the rows' scales and lowest codes: no difference beyond chance.

    Deviations from the source: groups are found by k-means on the calibrated ranges, not by a gradient search over soft memberships; the ranges of a
    group are those of the recipe, not learned with the groups.

    Attributes:
        groups: Number of remaining rows. Source: 8.
        contiguous: Whether a group is an interval of the schedule. Source: no.
        choose: Whether timesteps are chosen; otherwise they are those of sampling in as many steps.
        candidates: Number of candidate timesteps, evenly spaced over the sampling.
        probes: Trajectories for the choice.
        spread: Weight of the structural term, how well the chosen timesteps represent all, relative to the uncertainty of each between groups.
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
        """Refuse recipes without activation ranges, with fewer rows than groups, or with more than there are candidates."""
        needs_quantized_inputs(self, recipe)
        needs_rows(self, recipe, self.groups)
        if self.choose and recipe.rows > self.candidates:
            raise InputError(
                f"adp.candidates is {self.candidates}, fewer than the {recipe.rows} rows to choose. Set more candidates, or fewer rows."
            )

    def timesteps(self, context: PassContext) -> Tensor | None:
        """The chosen timesteps; the noisiest is always included, because trajectories start there."""
        if not self.choose:
            return None
        candidates = calibrated_timesteps(context.source.scheduler, self.candidates, context.source.family_object.sigmas(self.candidates))
        if context.recipe.rows > len(candidates):
            return None  # some candidates were rounded to the same integer timestep
        features = _range_features(context, candidates, self.probes)
        groups = segment(features, self.groups) if self.contiguous else cluster(features, self.groups)
        chosen = select(uncertainty(features, groups), similarity(features, groups), context.recipe.rows, self.spread, len(candidates) - 1)
        return candidates[chosen]

    def before(self, student: Student, context: PassContext) -> None:
        """Allocate the row assignment, also for loading that of a checkpoint."""
        student.shared_row = nn.Parameter(torch.arange(len(student.timesteps), dtype=torch.int32), requires_grad=False)

    @torch.no_grad()
    def calibrated(self, student: Student, context: PassContext) -> None:
        """Cluster the rows by their values at all sites jointly; all rows of a group use its first row, whose range is searched on the group's inputs."""
        groups = self.share_rows(student)
        if not context.recipe.static:  # else all rows are equal already
            search_ranges(student, context, groups)

    def share_rows(self, student: Student) -> Tensor:
        """Let all rows of a group use its first row. Returns the group of each row, int64 [R]."""
        columns = [part for quantizer in student.quantizers.values() for part in (quantizer.log_scale, quantizer.qmin / quantizer.levels)]
        rows = torch.stack([column.detach().cpu() for column in columns], dim=1)
        groups = segment(rows, self.groups) if self.contiguous else cluster(rows, self.groups)
        shared = torch.stack([torch.nonzero(groups == group)[0, 0] for group in groups])
        assert student.shared_row is not None  # set by `before`
        student.shared_row.data.copy_(shared)
        return groups

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with one table row per group."""
        assert student.shared_row is not None  # set by `before`
        return keep_rows(artifact, student.shared_row.detach().cpu())


PASS = Adp


def keep_rows(artifact: Artifact, shared: Tensor) -> Artifact:
    """The artifact with only those rows that others use.

    Args:
        artifact: R rows.
        shared: int [R], for each row the row that it uses, which uses itself.
    """
    kept, position = torch.unique(shared.long(), return_inverse=True)
    sites = {}
    for name, site in artifact.sites.items():
        table, relaxed = (None if table is None else table.at_rows(kept) for table in (site.activation, site.relaxed_activation))
        sites[name] = replace(site, activation=table, relaxed_activation=relaxed)
    row_of_timestep = position[artifact.row_of_timestep.long()].to(torch.int32)
    return replace(artifact, timesteps=artifact.timesteps[kept], row_of_timestep=row_of_timestep, sites=sites)


@torch.no_grad()
def search_ranges(student: Student, context: PassContext, groups: Tensor) -> None:
    """Set all rows of a group to the range that the recipe finds on the inputs of all of them, observed along the float model's trajectories.

    Args:
        student: Calibrated row by row.
        context: Recipe and source.
        groups: int64 [R], the group of each row.
    """
    recipe, teacher = context.recipe, Teacher(context.source, context.device)
    layers = teacher.family.sites(teacher.model)
    generator = torch.Generator().manual_seed(recipe.seed)
    observers = {name: Observer(generator) for name in student.quantizers}
    pooled: dict[tuple[str, int], ActivationSamples] = {}
    trajectories = Trajectories(
        context.source,
        student.timesteps,
        size=recipe.pool_size(),
        eta=recipe.eta,
        seed=recipe.seed,
        device=context.device,
        conditioner=context.conditioner,
    )

    with input_hooks((layers[name], input_hook(student.layers[name], observer)) for name, observer in observers.items()):
        for row, batches in trajectories.traverse_schedule(FORWARD_BATCH):
            for batch in batches:
                trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))
            group = int(groups[row])
            members = int((groups == group).sum())
            for name, observer in observers.items():
                # Equal shares of every row, and as many values as of one row alone.
                found = observer.pop().subsample(members, generator)
                pooled[name, group] = pooled[name, group] + found if (name, group) in pooled else found
    searched = [(table, name, group) for name, group in pooled for table in student.quantizers[name].tables]
    ranges = parallel_map(lambda entry: recipe.activation_range(pooled[entry[1:]], entry[0].spec), searched)
    for (table, _, group), found_range in zip(searched, ranges, strict=True):
        for row in torch.nonzero(groups == group)[:, 0].tolist():
            table.set_row(row, found_range)


def uncertainty(features: Tensor, groups: Tensor) -> Tensor:
    """Uncertainty of each timestep between the groups: the entropy of its memberships, 0 to 1, float [T].

    Source: arXiv 2305.18723, the entropy of the importance weights.
    """
    shares = memberships(features, groups)
    entropy = -(shares * shares.clamp(min=1e-12).log()).sum(1)
    return entropy / math.log(max(shares.shape[1], 2))


def similarity(features: Tensor, groups: Tensor) -> Tensor:
    """Gaussian kernel between timesteps with the mean squared distance within groups as variance: float [T, T], 1 on the diagonal."""
    distances = torch.cdist(features, features).square()
    same_group = groups[:, None] == groups[None, :]
    variance = distances[same_group].mean().clamp(min=torch.finfo(distances.dtype).tiny)
    return (-distances / (2 * variance)).exp()


def select(gain: Tensor, kernel: Tensor, count: int, spread: float, first: int) -> Tensor:
    """Timesteps chosen greedily for the largest `gain + spread (mean similarity to all - mean similarity to those chosen)`.

    The second term is the reduction of the maximum mean discrepancy between the chosen timesteps and all: the structural risk, which keeps the first,
    empirical term from being estimated on a few similar timesteps.

    Args:
        gain: float [T].
        kernel: float [T, T], similarity of timesteps.
        count: Number of timesteps, at most T.
        spread: Weight of the second term.
        first: Chosen first, whatever its score.

    Returns:
        int64 [count], ascending.

    Source: arXiv 2305.18723, structural risk minimisation with maximum mean discrepancy.
    """
    chosen = [first]
    while len(chosen) < count:
        score = gain + spread * (kernel.mean(1) - kernel[:, chosen].mean(1))
        score[chosen] = -math.inf
        chosen.append(int(score.argmax()))
    return torch.tensor(sorted(chosen))


def _range_features(context: PassContext, timesteps: Tensor, samples: int) -> Tensor:
    """Range of every site's input at each timestep: the logarithm of its width, and the relative position of its lower end. float [T, 2 sites]."""
    recipe, teacher = context.recipe, Teacher(context.source, context.device)
    observers = {name: MinMaxObserver() for name in teacher.family.sites(teacher.model)}
    trajectories = Trajectories(
        context.source, timesteps, size=samples, eta=recipe.eta, seed=recipe.seed, device=context.device, conditioner=context.conditioner
    )
    features = torch.zeros(len(timesteps), 2 * len(observers))
    with input_hooks((layer, observers[name]) for name, layer in teacher.family.sites(teacher.model).items()):
        for row, batches in trajectories.traverse_schedule(samples):
            for batch in batches:
                trajectories.advance(batch, batch.conditioning.combine(teacher(batch.inputs)))
            low, high = torch.tensor([observer.pop() for observer in observers.values()]).T
            width = (high - low).clamp(min=1e-12)
            features[row] = torch.cat([width.log(), low / width])
    return features
