"""PCR: each table row is calibrated on samples of the quantized model, and activations stay in floating point at some timesteps.

Source: Tang et al., Post-training Quantization for Text-to-Image Diffusion Models with Progressive Calibration and Activation Relaxing, ECCV 2024,
arXiv 2311.06322; constants from the released code, github.com/tsa18/PCR at 249a6a1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from calibration.base_pass import Pass, PassContext, needs_quantized_inputs
from calibration.recipe import Recipe
from calibration.run.setting_checks import within
from calibration.student.student import Student
from edm_deploy.artifact.artifact import Artifact
from edm_deploy.errors import InputError
from edm_deploy.pipelines.sampling import set_steps
from edm_deploy.pipelines.source import Source

GRID = 100  # sampling steps that define the shares


@dataclass(frozen=True, kw_only=True)
class Pcr(Pass):
    """Progressive calibration, and activation relaxing in an interval of the sampling: 0 is its first, noisiest step, 1 its end.

    The released code relaxes to 10-bit activations, for which there is no kernel; here they stay in floating point, in a second engine with the same
    weights. The relaxed timesteps do not depend on the number of sampling steps.

    Attributes:
        relax_from: Start of the relaxed interval. Source: 0.8 for Stable Diffusion, 0.0 for SDXL.
        relax_to: End of the relaxed interval; equal to `relax_from` for none. Source: 1.0 for Stable Diffusion, 0.2 for SDXL.
    """

    name: ClassVar[str] = "pcr"
    student_leads: ClassVar[bool] = True
    relax_from: float = 0.8
    relax_to: float = 1.0

    def __post_init__(self) -> None:
        within("pcr.relax_from", self.relax_from, 0.0, 1.0)
        within("pcr.relax_to", self.relax_to, self.relax_from, 1.0)

    def check(self, recipe: Recipe, others: Sequence[Pass]) -> None:
        """Refuse recipes without activation ranges, and a run in which no timestep would be quantized."""
        needs_quantized_inputs(self, recipe)
        if self.relax_to - self.relax_from == 1.0:
            raise InputError(
                "pcr.relax_from 0 with pcr.relax_to 1 leaves activations in floating point everywhere. Relax less, or set act_bits to 16."
            )

    def before(self, student: Student, context: PassContext) -> None:
        """Leave the student's activations in floating point at the relaxed timesteps, while it leads and while it is trained."""
        relaxed = self.relaxed(context.source)
        student.float_rows = None if relaxed is None else relaxed[student.timesteps.long()].bool()

    def finish(self, artifact: Artifact, student: Student, context: PassContext) -> Artifact:
        """The artifact with its relaxed timesteps."""
        return replace(artifact, relaxed=self.relaxed(context.source))

    def relaxed(self, source: Source) -> Tensor | None:
        """uint8 [num_train_timesteps], 1 at the timesteps of the relaxed interval; None if it is empty."""
        scheduler, length = copy.deepcopy(source.scheduler), source.num_train_timesteps
        set_steps(scheduler, GRID, source.family_object.sigmas(GRID))
        timesteps = torch.as_tensor(scheduler.timesteps).double()
        first, last = round(self.relax_from * GRID), round(self.relax_to * GRID)  # step 0 is the noisiest
        if first == last:
            return None
        every = torch.arange(length)
        mask = every >= (timesteps[last - 1] if last < GRID else 0)
        mask &= every < (timesteps[first - 1] if first > 0 else length)
        return mask.to(torch.uint8)


PASS = Pcr
