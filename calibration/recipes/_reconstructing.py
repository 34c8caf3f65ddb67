"""Base of the recipes that reconstruct blocks: common settings and the sampling of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calibration.data.trajectory_pool import FORWARD_BATCH, Batch, Trajectories
from calibration.recipes.mse import LeastSquares
from calibration.reconstruction.block_cache import CACHE_BYTES, ModelInputs
from calibration.reconstruction.block_optimizers import RoundingOptimizer
from calibration.reconstruction.blocks import Partition, check_partition
from calibration.run.dtypes import ComputeDtype, check_dtype
from calibration.run.setting_checks import at_least
from calibration.student.student import Student

Predict = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReconstructionRecipe(LeastSquares):
    """Starts from the MSE calibration. Rates refer to the stated number of steps: training with fewer steps uses larger ones, up to 0.1.

    Attributes:
        steps: Training steps per block. Source: BRECQ and Q-Diffusion, 20000.
        batch: Samples per step. Source: Q-Diffusion, 32.
        rounding_rate: Rate of AdaRound's logits at 20000 steps. Source: Adam's default, 1e-3.
        rounding_weight: Weight of AdaRound's regularizer. Source: AdaRound, 0.01.
        partition: What is reconstructed together: `block`, `layer`, or blocks joined and divided by `entropy` (Q-VLM).
        compute: Dtype in which the student computes. Scales and rounding are always float32.
        step_weighting: Power of the effect of each sampling step on the final sample that its errors are multiplied by. Source: none, 0.
    """

    trains = True
    starts_from_artifact = True
    bias_correction: bool = False
    steps: int = 20000
    batch: int = 32
    rounding_rate: float = 1e-3
    rounding_weight: float = 0.01
    partition: Partition = "block"
    compute: ComputeDtype = "bf16"
    step_weighting: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("rounding_rate", "rounding_weight", "step_weighting"):
            at_least(name, getattr(self, name), 0.0)
        check_partition(self.partition)
        check_dtype("compute", self.compute)

    @property
    def comparison_of_layers(self) -> str | None:
        """`partition=block`, unless set."""
        return None if self.partition == "block" else "partition=block"

    @property
    def cached_bytes(self) -> int:
        """Inputs and outputs of one block."""
        return CACHE_BYTES

    @property
    def samples(self) -> int:
        """Inputs that blocks are reconstructed on: every trajectory at every row."""
        return self.calibration_samples * self.rows

    def rounding(self, student: Student) -> RoundingOptimizer:
        """AdaRound with these settings."""
        return RoundingOptimizer(student, step_length=20000 * self.rounding_rate, weight=self.rounding_weight)


@torch.no_grad()
def sample_trajectories(trajectories: Trajectories, lead: Predict, count: int) -> ModelInputs:
    """Draw samples from a pool that is staggered over the schedule, i.e. uniformly over its timesteps.

    Args:
        trajectories: Advanced as far as needed.
        lead: Prediction from graph inputs by name: the teacher, or the student itself.
        count: Minimum number of samples, not counting those without conditioning under classifier-free guidance.
    """
    batches: list[Batch] = []
    while sum(len(batch.indices) for batch in batches) < count:
        batches.append(trajectories.next_batch(min(FORWARD_BATCH, trajectories.size)))
        trajectories.advance(batches[-1], batches[-1].conditioning.combine(lead(batches[-1].inputs).float()))
    return ModelInputs.from_batches(batches)
