"""TCAQ-DM: inputs of convolutions equalized over channels and timesteps, then blocks reconstructed on samples of the quantized model itself.

Source: Huang et al., TCAQ-DM, AAAI 2025, arXiv 2412.16700. There is no released code; choices that the paper leaves open are stated below.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import FORWARD_BATCH, Trajectories
from calibration.observers.channel_scaling import channel_ranges, scalable, set_pre_scales
from calibration.recipe import TrainingContext
from calibration.recipes._reconstructing import ReconstructionRecipe, sample_trajectories
from calibration.reconstruction.block_cache import ModelInputs
from calibration.reconstruction.block_optimizers import ActivationScaleOptimizer
from calibration.reconstruction.reconstruct import Stage, reconstruct
from calibration.run.dtypes import DTYPES
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student


@dataclass(frozen=True, kw_only=True)
class Tcaq(ReconstructionRecipe):
    """Timestep-channel reparameterization (TCR), then progressively aligned reconstruction (PAR).

    Deviations from the paper: no quantizer of the softmax, uniform or log2 by timestep (DAQ), because attention's matrix products stay in floating point
    here; one pass over the blocks per round instead of two, because rounding and scales are trained jointly.

    Attributes:
        strength: Power of the channels' maxima that inputs are divided by: 1 equalizes them fully, 0 not at all. Source: 1.
        groups: Number of groups of neighbouring timesteps whose maxima are averaged. Source: uniform groups, number not stated.
        rounds: Rounds of reconstruction; all but the first use samples of the quantized model. Source: several, number not stated.
        scale_rate: Rate of the logarithm of the activation scales at 5000 steps, with half-cosine decay. Source: BRECQ and Q-Diffusion, 4e-4.
        bound_rate: Rate of the lowest code of asymmetric ranges, likewise. Source: none, bounds are fixed.
    """

    name = "tcaq"
    weight_bits: int = 4
    act_bits: int = 4
    strength: float = 1.0
    groups: int = 10
    rounds: int = 2
    scale_rate: float = 4e-4
    bound_rate: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        within("strength", self.strength, 0.0, 1.0)
        for name in ("groups", "rounds"):
            at_least(name, getattr(self, name), 1)
        for name in ("scale_rate", "bound_rate"):
            at_least(name, getattr(self, name), 0.0)

    def fit(self, context: TrainingContext) -> None:
        """Reparameterize and calibrate, unless a checkpoint is resumed; then reconstruct, round by round."""
        student = context.student
        rounding = self.rounding(student)
        if not context.run.options.resume:
            if self.strength and context.run.calibrates:
                self.reparameterize(context)
            super().fit(context)
        student.compute_dtype = DTYPES[self.compute]

        def teacher_samples(count: int) -> ModelInputs:
            return sample_trajectories(context.trajectories, context.teacher, count)

        def student_samples(count: int) -> ModelInputs:
            restart_with_student(context.trajectories, student)
            return sample_trajectories(context.trajectories, student, count)

        stages = [
            Stage(
                optimizers=[
                    rounding,
                    ActivationScaleOptimizer(step_length=5000 * self.scale_rate, bound_step_length=5000 * self.bound_rate),
                ],
                steps=self.steps,
                batch=self.batch,
                samples=self.samples,
                draw=student_samples if number else teacher_samples,
            )
            for number in range(self.rounds)
        ]
        reconstruct(context, self.partition, stages, seed=self.seed, step_weighting=self.step_weighting)

    def reparameterize(self, context: TrainingContext) -> None:
        """TCR: divide the input of every quantized convolution by its channels' weighted maxima over the timesteps, and search the weight scales again."""
        student = context.student
        names = [name for name in scalable(student) if isinstance(student.layers[name].layer, nn.Conv2d) and student.layers[name].quantizer]
        observed = channel_ranges(context, names)
        set_pre_scales(
            student, self, {name: weighted_maxima(ranges.magnitude(), self.groups).pow(-self.strength) for name, ranges in observed.items()}
        )


def weighted_maxima(maxima: Tensor, groups: int) -> Tensor:
    """Weighted maximum of each channel: the mean of its groups' maxima, weighted by the maxima themselves.

    Args:
        maxima: float32 [R, C], the largest magnitude of each channel at each timestep.
        groups: Number of groups of neighbouring timesteps, of sizes as equal as possible; limited to the number of timesteps.

    Returns:
        float32 [C], each > 0, normalized to a mean of 1, which does not affect quantization; 1 for channels that are always 0.
    """
    largest = torch.stack([group.amax(0) for group in torch.tensor_split(maxima, min(groups, len(maxima)))])
    weighted = largest.square().sum(0) / largest.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    alive = weighted > 0
    mean = weighted[alive].mean() if bool(alive.any()) else torch.ones(())
    return torch.where(alive, weighted / mean, 1.0)


@torch.no_grad()
def restart_with_student(trajectories: Trajectories, student: Student) -> None:
    """PAR: restart the pool and lead its samples by the quantized model, up to their staggered timesteps."""
    trajectories.restart()
    for _, batches in trajectories.traverse_schedule(FORWARD_BATCH):
        for batch in batches:
            trajectories.advance(batch, batch.conditioning.combine(student(batch.inputs).float()))


RECIPE = Tcaq
