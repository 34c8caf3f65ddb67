"""What the recipes that reconstruct blocks have in common: their settings, and where their samples come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calibration.data.trajectory_pool import Batch, Trajectories
from calibration.recipes.mse import Mse
from calibration.reconstruction.block_cache import CACHE_BYTES, PASS, ModelInputs
from calibration.reconstruction.block_optimizers import LearnRounding
from calibration.reconstruction.blocks import Partition, check_partition
from calibration.run.setting_checks import at_least
from calibration.student.student import Student
from calibration.student.teacher import DTYPES
from calibration.training import distillation

Predict = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class ReconstructionRecipe(Mse):
    """Starts from the MSE calibration. Rates are those at the named number of steps: a training of fewer takes longer steps, up to 0.1.

    Attributes:
        steps: Training steps of a block. Source: BRECQ and Q-Diffusion, 20000.
        batch: Samples a step. Source: Q-Diffusion, 32.
        rounding_rate: Rate of AdaRound's logits at 20000 steps. Source: Adam's own, 1e-3.
        rounding_weight: Of AdaRound's regularizer. Source: AdaRound, 0.01.
        partition: What is reconstructed together: `block`, `layer`, or blocks joined and cut by `entropy` (Q-VLM).
        compute: What the student computes in. Its scales and rounding are float32 always.
    """

    trains = True
    bias_correction: bool = False
    steps: int = 20000
    batch: int = 32
    rounding_rate: float = 1e-3
    rounding_weight: float = 0.01
    partition: Partition = "block"
    compute: Literal["bf16", "fp32"] = "bf16"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch"):
            at_least(name, getattr(self, name), 1)
        for name in ("rounding_rate", "rounding_weight"):
            at_least(name, getattr(self, name), 0.0)
        check_partition(self.partition)
        if self.compute not in DTYPES:
            distillation.refuse_compute(self.compute)

    @property
    def cached_bytes(self) -> int:
        """A block's inputs and outputs."""
        return CACHE_BYTES

    @property
    def samples(self) -> int:
        """Inputs that blocks are reconstructed on: every trajectory at every row."""
        return self.calibration_samples * self.rows

    def rounding(self, student: Student) -> LearnRounding:
        """AdaRound with these settings."""
        return LearnRounding(student, travel=20000 * self.rounding_rate, weight=self.rounding_weight)


@torch.no_grad()
def sample_trajectories(trajectories: Trajectories, lead: Predict, count: int) -> ModelInputs:
    """Samples of a pool that is staggered over the schedule: uniform in their timesteps, whoever leads.

    Args:
        trajectories: Goes on as far as is needed.
        lead: Prediction of graph inputs by name: the teacher, or the student itself.
        count: How many; a guided model's count once for both halves.
    """
    batches: list[Batch] = []
    while sum(len(batch.members) for batch in batches) < count:
        batches.append(trajectories.take(min(PASS, trajectories.size)))
        trajectories.advance(batches[-1], batches[-1].conditioning.combine(lead(batches[-1].inputs).float()))
    return ModelInputs.of(batches)
