"""What a pass is: something that any recipe can be composed with, before, while and after it calibrates and trains. One a file in `passes/`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.pipelines.guidance import Conditioner
from edm_deploy.pipelines.source import Source

if TYPE_CHECKING:
    from calibration.recipe import Recipe
    from calibration.student.student import Student


@dataclass(frozen=True)
class PassContext:
    """What a pass may look at.

    Attributes:
        source: The float model.
        recipe: The recipe that it is composed with.
        conditioner: Draws what samples are told.
        device: Where the work is done.
    """

    source: Source
    recipe: Recipe
    conditioner: Conditioner
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A pass and its settings. Each hook does nothing unless a pass overrides it; they are called in this order, passes in the order given.

    Attributes:
        student_leads: Whether the samples that ranges are observed on are led by the student, each row by the noisier rows already quantized,
            instead of by the teacher.
    """

    name: ClassVar[str]
    student_leads: ClassVar[bool] = False

    def check(self, recipe: Recipe, others: Sequence[Pass]) -> None:
        """Refuse what this pass does not compose with, before anything runs.

        Args:
            recipe: With its settings.
            others: The other passes of the run.

        Raises:
            InputError: The message says which two, and why.
        """

    def timesteps(self, context: PassContext) -> Tensor | None:
        """int32 [R] ascending, the timesteps that become table rows; None leaves them to the recipe."""
        return None

    def before(self, student: Student, context: PassContext) -> None:
        """Prepare the student, before the recipe and also when a run is resumed; in place."""

    def calibrated(self, student: Student, context: PassContext) -> None:
        """Change the student's ranges once they are observed, before anything is trained; in place."""

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with what this pass adds to it; `student` computes what it computes."""
        return artifact

    def settings(self) -> dict[str, Any]:
        """Every setting by name, for provenance and checkpoints."""
        return asdict(self)


def check_passes(passes: Sequence[Pass], recipe: Recipe) -> None:
    """Raises InputError where two of a run do not compose, or a pass is named twice."""
    names = [chosen.name for chosen in passes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"Pass {twice[0]!r} is given twice; it has one set of settings. Name it once.")
    for index, chosen in enumerate(passes):
        chosen.check(recipe, [*passes[:index], *passes[index + 1 :]])


def needs_quantized_inputs(chosen: Pass, recipe: Recipe) -> None:
    """Raises InputError where `recipe` leaves activations in floating point, for a pass that works on their ranges."""
    if recipe.act_bits == WEIGHT_ONLY_BITS:
        raise InputError(
            f"Pass {chosen.name!r} does not compose with act_bits {recipe.act_bits}: {recipe.name} leaves activations in floating point, and "
            f"{chosen.name} works on their ranges. Leave it out, or set act_bits to 8 or fewer."
        )


def needs_rows(chosen: Pass, recipe: Recipe, rows: int) -> None:
    """Raises InputError where `recipe` has fewer table rows than a pass needs."""
    if recipe.rows < rows:
        raise InputError(
            f"Pass {chosen.name!r} does not compose with {recipe.name} at rows {recipe.rows}: it needs {rows} or more. "
            f"Set rows to {rows} or more, or leave the pass out."
        )
