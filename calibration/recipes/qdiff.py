"""Q-Diffusion: rounding learned block by block on uniformly sampled timesteps, one activation scale for all timesteps.

Source: Li et al., Q-Diffusion, ICCV 2023, arXiv 2302.04304; constants from the released code, github.com/Xiuyu-Li/q-diffusion at 715783d.
"""

from __future__ import annotations

from dataclasses import dataclass

from calibration.blockwise import Blockwise, drawn
from calibration.learners import LearnScales
from calibration.recipe import Run, at_least
from calibration.reconstruct import Stage, reconstruct
from calibration.student import DTYPES, Student, Teacher
from calibration.trajectories import Trajectories


@dataclass(frozen=True, kw_only=True)
class QDiff(Blockwise):
    """Weights first, with activations in floating point; then the activation scales.

    Attributes:
        scale_rate: Rate of the logarithm of the activation scales at 5000 steps, falling as half a cosine. Source: 4e-4, of the scale itself.
    """

    name = "qdiff"
    weight_bits: int = 4
    act_bits: int = 8
    rows: int = 20
    calibration_samples: int = 256
    scale_rate: float = 4e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("scale_rate", self.scale_rate, 0.0)

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Calibrate, unless a checkpoint is resumed; then round, then scale."""
        rounding = Stage(
            learners=[self.rounding(student)],
            steps=self.steps,
            batch=self.batch,
            samples=self.samples,
            draw=lambda count: drawn(trajectories, teacher, count),
            rounds_activations=False,
        )
        scales = Stage(
            learners=[LearnScales(travel=5000 * self.scale_rate, static=True)],
            steps=max(1, self.steps // 4),  # 5000 of 20000
            batch=self.batch,
            samples=self.samples,
        )
        if not run.options.resume:
            super().fit(student, teacher, trajectories, run)
        student.compute_dtype = DTYPES[self.compute]
        reconstruct(student, teacher, trajectories, self.partition, [rounding, scales], run, seed=self.seed)


RECIPE = QDiff
