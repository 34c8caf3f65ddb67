"""TCAQ-DM: convolutions' inputs evened out over channels and timesteps, then blocks reconstructed on samples of the quantized model itself.

Source: Huang et al., TCAQ-DM, AAAI 2025, arXiv 2412.16700. There is no released code; what the paper's summaries leave open is said below.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.data.trajectory_pool import Trajectories
from calibration.observers.calibrate import BATCH
from calibration.observers.channel_scaling import channel_ranges, scalable, set_pre_scales
from calibration.recipes._reconstructing import ReconstructionRecipe, sample_trajectories
from calibration.reconstruction.block_cache import ModelInputs
from calibration.reconstruction.block_optimizers import LearnScales
from calibration.reconstruction.reconstruct import Stage, reconstruct
from calibration.run.options import Run
from calibration.run.setting_checks import at_least, within
from calibration.student.student import Student
from calibration.student.teacher import DTYPES, Teacher


@dataclass(frozen=True, kw_only=True)
class Tcaq(ReconstructionRecipe):
    """Timestep-channel reparameterization (TCR), then progressively aligned reconstruction (PAR).

    Not repeated: the quantizer of the softmax, uniform or log2 by timestep (DAQ), because attention's products stay in floating point here; two walks
    over the blocks in each round, for weights and for activations, because rounding and scales are learned together.

    Attributes:
        strength: Power of the channels' maxima that inputs are divided by: 1 evens them out wholly, 0 leaves them. Source: 1.
        groups: Groups of neighbouring timesteps whose maxima are weighed against each other. Source: uniform groups, without their number.
        rounds: Rounds of reconstruction; all but the first draw their samples from the quantized model. Source: several, without their number.
        scale_rate: Rate of the logarithm of the activation scales at 5000 steps, falling as half a cosine. Source: BRECQ and Q-Diffusion, 4e-4.
        bound_rate: Likewise of the lowest code of asymmetric ranges. Source: none, bounds stay.
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

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Reparameterize and calibrate, unless a checkpoint is resumed; then reconstruct, round by round."""
        rounding = self.rounding(student)
        if not run.options.resume:
            if self.strength:
                self.reparameterize(student, teacher, trajectories)
            super().fit(student, teacher, trajectories, run)
        student.compute_dtype = DTYPES[self.compute]

        def on_float(count: int) -> ModelInputs:
            return sample_trajectories(trajectories, teacher, count)

        def on_itself(count: int) -> ModelInputs:
            lead_anew(trajectories, student)
            return sample_trajectories(trajectories, student, count)

        stages = [
            Stage(
                learners=[rounding, LearnScales(travel=5000 * self.scale_rate, bound_travel=5000 * self.bound_rate)],
                steps=self.steps,
                batch=self.batch,
                samples=self.samples,
                draw=on_itself if number else on_float,
            )
            for number in range(self.rounds)
        ]
        reconstruct(student, teacher, trajectories, self.partition, stages, run, seed=self.seed)

    def reparameterize(self, student: Student, teacher: Teacher, trajectories: Trajectories) -> None:
        """TCR: divide the input of every quantized convolution by what its channels reach over the timesteps, and search its weight scales anew."""
        names = [name for name in scalable(student) if isinstance(student.layers[name].layer, nn.Conv2d) and student.layers[name].quantizer]
        seen = channel_ranges(student, teacher, trajectories, names)
        set_pre_scales(student, self, {name: reach(ranges.magnitude(), self.groups).pow(-self.strength) for name, ranges in seen.items()})


def reach(maxima: Tensor, groups: int) -> Tensor:
    """What each channel reaches: the mean of its groups' maxima, weighed by the maxima themselves.

    Args:
        maxima: float32 [R, C], the largest magnitude of each channel at each timestep.
        groups: Of neighbouring timesteps, as equal in number as can be; no more than there are timesteps count.

    Returns:
        float32 [C], each > 0: in units in which their mean is 1, which no quantizer notices. Channels that are always 0 reach the mean.
    """
    largest = torch.stack([group.amax(0) for group in torch.tensor_split(maxima, min(groups, len(maxima)))])
    reached = largest.square().sum(0) / largest.sum(0).clamp(min=torch.finfo(torch.float32).tiny)
    seen = reached > 0
    mean = reached[seen].mean() if bool(seen.any()) else torch.ones(())
    return torch.where(seen, reached / mean, 1.0)


@torch.no_grad()
def lead_anew(trajectories: Trajectories, student: Student) -> None:
    """PAR: samples that the quantized model itself has led from noise to where they stand."""
    trajectories.restart()
    for _, batches in trajectories.sweep(BATCH):
        for batch in batches:
            inputs: Mapping[str, Tensor] = batch.inputs
            trajectories.advance(batch, batch.conditioning.combine(student(inputs).float()))


RECIPE = Tcaq
