"""Q-Diffusion: rounding learned block by block on uniformly sampled timesteps, one activation scale for all timesteps.

Source: Li et al., Q-Diffusion, ICCV 2023, arXiv 2302.04304; constants from the released code, github.com/Xiuyu-Li/q-diffusion at 715783d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from calibration.recipe import TrainingContext
from calibration.recipes._reconstructing import ReconstructionRecipe, sample_trajectories
from calibration.reconstruction.block_optimizers import ActivationScaleOptimizer
from calibration.reconstruction.concat_inputs import concatenated_inputs
from calibration.reconstruction.reconstruct import Stage, reconstruct
from calibration.run.dtypes import DTYPES
from calibration.run.setting_checks import at_least
from edm_deploy.errors import InputError
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite
from edm_deploy.pipelines.source import Source

Split = Literal["shortcut", "all", "none"]
SPLITS = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class QDiff(ReconstructionRecipe):
    """First the weights, with activations in floating point, then the activation scales.

    Deviations from the released code: weights are symmetric and the lowest code of a range is an integer, as in every recipe here; attention's matrix
    products stay in floating point; first and last layers stay at 8 bit; rounding starts from weight scales of least error, which are not searched
    again after a split; both stages minimize the squared error of a block's output, whereas the source's activation stage minimizes its power 2.4.

    Attributes:
        split: Which layers on a concatenation quantize its parts separately, each with its own scales: `shortcut` the 1x1 convolutions whose input it
            is, `all` also the layers behind its norm and activation. Source: shortcut, section 4.3.
        scale_rate: Rate of the logarithm of the activation scales at 5000 steps, with half-cosine decay. Source: 4e-4, of the scale itself.
    """

    name = "qdiff"
    weight_bits: int = 4
    act_bits: int = 8
    rows: int = 20
    calibration_samples: int = 256
    scale_rate: float = 4e-4
    split: Split = "shortcut"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("scale_rate", self.scale_rate, 0.0)
        if self.split not in SPLITS:
            raise InputError(f"split is {self.split!r}; expected one of {', '.join(SPLITS)}. Set another split.")

    @property
    def static(self) -> bool:
        """Always true: one range for all timesteps (section 4.1)."""
        return True

    def structure(self, source: Source) -> NetworkRewrite:
        """Layers on a concatenation, split between its parts."""
        if self.split == "none":
            return PUBLISHED
        segments = concatenated_inputs(source.family_object, source.config, through=self.split == "all")
        layers = {name: source.model.get_submodule(name) for name in segments}
        return NetworkRewrite({name: sizes for name, sizes in segments.items() if self.split == "all" or _is_shortcut(layers[name])})

    def fit(self, context: TrainingContext) -> None:
        """Calibrate, unless a checkpoint is resumed; then train the rounding, then the activation scales."""
        rounding = Stage(
            optimizers=[self.rounding(context.student)],
            steps=self.steps,
            batch=self.batch,
            samples=self.samples,
            draw=lambda count: sample_trajectories(context.trajectories, context.teacher, count),
            quantizes_activations=False,
        )
        scales = Stage(
            optimizers=[ActivationScaleOptimizer(step_length=5000 * self.scale_rate, static=True)],
            steps=max(1, self.steps // 4),  # 5000 of 20000
            batch=self.batch,
            samples=self.samples,
        )
        if not context.run.options.resume:
            super().fit(context)
        context.student.compute_dtype = DTYPES[self.compute]
        reconstruct(context, self.partition, [rounding, scales], seed=self.seed, step_weighting=self.step_weighting)


def _is_shortcut(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1)


RECIPE = QDiff
