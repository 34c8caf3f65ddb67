"""The contract of a pass: an addition to any recipe, with hooks before, during and after calibration and training. `passes/` holds one pass per file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from calibration.recipe import Recipe
from calibration.run.options import Run, RunOptions
from calibration.student.quantization_spec import LayerSpec
from calibration.student.student import Student
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.network.layer_costs import ModelWork
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.source import Source


@dataclass(frozen=True)
class SitePrice:
    """Expected seconds of one site in each arithmetic."""

    int4: float
    int8: float


# Prices of every site by name, from the work of the model, the name of a GPU and the samples of a call.
SitePricer = Callable[[ModelWork, str, int], Mapping[str, SitePrice]]


def measuring_run() -> Run:
    """A run without checkpoints, budget and progress, for what a pass measures before the run itself."""
    return Run(options=RunOptions(teacher_dtype="fp32"), identity={}, on_progress=lambda _: None)


@dataclass(frozen=True)
class PassContext:
    """What the hooks of a pass may use.

    Attributes:
        source: The float model.
        recipe: The recipe of the run.
        conditioner: Draws labels and text embeddings.
        device: Device of student and teacher.
        structure: How the source's model was rewritten already.
        folded: Sites that stay in floating point.
        run: For networks that a pass calibrates to measure something, before the student of the run exists.
        prices: Expected times of sites on a GPU; None where the caller of `fit` has none.
    """

    source: Source
    recipe: Recipe
    conditioner: Conditioner
    device: torch.device
    structure: NetworkRewrite = PUBLISHED
    folded: tuple[str, ...] = ()
    run: Run = field(default_factory=measuring_run)
    prices: SitePricer | None = None


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A pass and its settings. Hooks do nothing unless overridden; they are called in the order below, passes in the order given by the user.

    Attributes:
        name: Name on the command line.
        student_leads: Whether the student instead of the teacher leads the trajectories that ranges are observed on: each row is observed on samples
            from the noisier rows, which are already quantized.
    """

    name: ClassVar[str]
    student_leads: ClassVar[bool] = False

    def check(self, recipe: Recipe, others: Sequence[Pass]) -> None:
        """Refuse recipes and passes that this pass does not compose with, before anything runs.

        Args:
            recipe: With its settings.
            others: The other passes of the run.

        Raises:
            InputError: The message names the conflict and its reason.
        """

    def timesteps(self, context: PassContext) -> Tensor | None:
        """int32 [R] ascending, the timesteps of the table rows; None leaves them to the recipe."""
        return None

    def specs(self, context: PassContext, planned: Mapping[str, LayerSpec]) -> Mapping[str, LayerSpec]:
        """Bit widths of every site by name, from those that the recipe and the passes before this one plan; called before the student exists.

        Not called where a run is resumed: its checkpoint has the result.

        Raises:
            InputError: The settings of the pass cannot be met.
        """
        return planned

    def before(self, student: Student, context: PassContext) -> None:
        """Prepare the student before the recipe, also when a run is resumed; in place."""

    def calibrated(self, student: Student, context: PassContext) -> None:
        """Change the student's ranges after they are observed and before training; in place."""

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with the additions of this pass."""
        return artifact

    def settings(self) -> dict[str, Any]:
        """Every setting by name, for provenance and checkpoints."""
        return asdict(self)


def check_passes(passes: Sequence[Pass], recipe: Recipe) -> None:
    """Raises InputError if a pass occurs twice, or does not compose with the recipe or the other passes."""
    names = [chosen.name for chosen in passes]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Pass {repeated[0]!r} is given twice; it can have only one set of settings. Name it once.")
    for index, chosen in enumerate(passes):
        chosen.check(recipe, [*passes[:index], *passes[index + 1 :]])


def needs_quantized_inputs(chosen: Pass, recipe: Recipe) -> None:
    """Raises InputError if `recipe` leaves activations in floating point, for a pass that works on their ranges."""
    if recipe.act_bits == WEIGHT_ONLY_BITS:
        raise InputError(
            f"Pass {chosen.name!r} does not compose with act_bits {recipe.act_bits}: {recipe.name} leaves activations in floating point, and "
            f"{chosen.name} works on their ranges. Leave it out, or set act_bits to 8 or fewer."
        )


def needs_rows(chosen: Pass, recipe: Recipe, rows: int) -> None:
    """Raises InputError if `recipe` has fewer table rows than a pass needs."""
    if recipe.rows < rows:
        raise InputError(
            f"Pass {chosen.name!r} does not compose with {recipe.name} at rows {recipe.rows}: it needs {rows} or more. "
            f"Set rows to {rows} or more, or leave the pass out."
        )
