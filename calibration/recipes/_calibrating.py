"""Base of the recipes without training: `fit` calibrates."""

from __future__ import annotations

from dataclasses import dataclass

from calibration.observers.calibrate import calibrate
from calibration.observers.stagger import stagger
from calibration.recipe import Recipe, TrainingContext


@dataclass(frozen=True, kw_only=True)
class CalibrationRecipe(Recipe):
    """Observes activations along the teacher's trajectories and sets every row of every table. Recipes that train start from its result."""

    def fit(self, context: TrainingContext) -> None:
        """Set the student's ranges and scales, in place; those of an artifact are kept."""
        if context.run.from_artifact:
            stagger(context)
        else:
            calibrate(context, self)
