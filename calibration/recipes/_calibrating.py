"""What recipes without training share: `fit` calibrates, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from calibration.data.trajectory_pool import Trajectories
from calibration.observers.calibrate import calibrate
from calibration.recipe import Recipe
from calibration.run.options import Run
from calibration.student.student import Student
from calibration.student.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class CalibrationRecipe(Recipe):
    """Observes activations along the teacher's trajectories and sets every row of every table. Recipes that train start from it."""

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Set the student's ranges and scales; in place."""
        calibrate(student, teacher, trajectories, self, run)
