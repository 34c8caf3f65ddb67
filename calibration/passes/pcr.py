"""PCR: each table row is calibrated inside the quantized model on its own samples, and inputs have more bits at some timesteps.

Source: Tang et al., Post-training Quantization for Text-to-Image Diffusion Models with Progressive Calibration and Activation Relaxing, ECCV 2024,
arXiv 2311.06322; constants from the released code, github.com/tsa18/PCR at 249a6a1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from calibration.base_pass import Pass, PassContext, needs_quantized_inputs
from calibration.recipe import Recipe
from calibration.run.setting_checks import within
from calibration.student.student import Student
from edm_deploy.artifact.quantized_layer import RELAXED_BITS
from edm_deploy.errors import InputError
from edm_deploy.numerics.codes import WEIGHT_ONLY_BITS
from edm_deploy.pipelines.sampling import set_steps
from edm_deploy.pipelines.source import Source

GRID = 100  # sampling steps that define the shares


@dataclass(frozen=True, kw_only=True)
class Pcr(Pass):
    """Progressive calibration, and activation relaxing in an interval of the sampling: 0 is its first, noisiest step, 1 its end.

    As in the source, ranges are observed inside the quantized network: each layer's input is what the layers before it, quantized at this row
    already, compute on samples that the quantized model itself led to this timestep.

    Deviations from the source. It relaxes to 10-bit activations, for which there is no kernel: here to 8 bits, in a second, INT8 engine of the same
    weights, or to floating point. It relaxes the last fifth for Stable Diffusion: here the noisiest fifth is the default, as the source has it for SDXL.
    On the shipped model at W4A4, fine-tuned, the last fifth gained 0.1 dB and the noisiest 4.6 dB in floating point (12 images): an error of an early
    step changes every later one. The relaxed timesteps do not depend on the number of sampling steps.

    Attributes:
        relax_from: Start of the relaxed interval. Source: 0.8 for Stable Diffusion, 0.0 for SDXL.
        relax_to: End of the relaxed interval; equal to `relax_from` for none. Source: 1.0 for Stable Diffusion, 0.2 for SDXL.
        relaxed_bits: Bits of the inputs in it: 8, or 16 for floating point. Sites that have 8 bits anyway keep their table; where the
            recipe's inputs have 8 bits, nothing is relaxed to 8. Source: 10.
    """

    name: ClassVar[str] = "pcr"
    student_leads: ClassVar[bool] = True
    relax_from: float = 0.0
    relax_to: float = 0.2
    relaxed_bits: int = RELAXED_BITS

    def __post_init__(self) -> None:
        within("pcr.relax_from", self.relax_from, 0.0, 1.0)
        within("pcr.relax_to", self.relax_to, self.relax_from, 1.0)
        if self.relaxed_bits not in (RELAXED_BITS, WEIGHT_ONLY_BITS):
            raise InputError(
                f"pcr.relaxed_bits is {self.relaxed_bits}; expected {RELAXED_BITS}, or {WEIGHT_ONLY_BITS} for floating point. Set another pcr.relaxed_bits."
            )

    def check(self, recipe: Recipe, others: Sequence[Pass]) -> None:
        """Refuse recipes without activation ranges, and a run in which every timestep would be relaxed."""
        needs_quantized_inputs(self, recipe)
        if self.relax_to - self.relax_from == 1.0:
            raise InputError(
                f"pcr.relax_from 0 with pcr.relax_to 1 relaxes every timestep. Relax less, or set act_bits to {self.relaxed_bits}."
            )

    def before(self, student: Student, context: PassContext) -> None:
        """Relax the student, while it leads, while it is trained, and in the artifact. The 8-bit tables stay as they are calibrated."""
        relaxed = self.relaxed(context.source)
        if relaxed is not None and context.recipe.act_bits < self.relaxed_bits:
            student.relax(relaxed, self.relaxed_bits)

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
