"""The contract of a recipe: a quantization method and its settings. `recipes/` holds one recipe per file."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch
from torch import Tensor

from calibration.data.observation import ActivationSamples
from calibration.data.trajectory_pool import Batch, Trajectories
from calibration.run.options import Run
from calibration.run.setting_checks import at_least, within
from calibration.student.quantization_spec import W8A8, LayerSpec, QuantRange
from calibration.student.student import Student
from calibration.student.teacher import Teacher
from edm_deploy.errors import InputError
from edm_deploy.network.placement import Placement
from edm_deploy.network.restructure import PUBLISHED, NetworkRewrite
from edm_deploy.network.rotation import MAX_BLOCK, is_block
from edm_deploy.numerics.codes import ACTIVATION_BITS, WEIGHT_BITS, WEIGHT_ONLY_BITS
from edm_deploy.numerics.seeds import check_seed
from edm_deploy.pipelines.source import Source

Rotate = Literal["off", "all", "auto"]


class AuxiliaryLoss(Protocol):
    """A term added to the error of the prediction."""

    @property
    def modules(self) -> Sequence[str]:
        """Names of the modules whose outputs are compared."""

    def statistics(self, teacher: Mapping[str, Tensor]) -> Tensor:
        """What the term depends on besides a mean over samples: float32 [S], each a mean over the batch. The term gets them averaged over all parts of a batch."""

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], statistics: Tensor | None = None) -> Tensor:
        """A scalar, a mean over the batch, from outputs by module name: [B, ...] each, the teacher's without gradients."""


@dataclass(frozen=True)
class TrainingContext:
    """What a recipe works on: the two networks, the samples, and the run.

    Attributes:
        student: Fake-quantized network; the recipe sets its ranges and scales, and trains it.
        teacher: Float network.
        trajectories: Pool of samples along the sampling trajectories.
        run: Options, progress, budget and notes.
        terms: Losses that are added to those of a recipe that distills.
    """

    student: Student
    teacher: Teacher
    trajectories: Trajectories
    run: Run
    terms: Sequence[AuxiliaryLoss] = ()

    def prediction(self, network: Student | Teacher, batch: Batch) -> Tensor:
        """Prediction of a network for a batch, combined under guidance, float32 [B, ...]. Each process computes its share of the batch and has the whole."""
        processes = self.run.options.processes
        own = batch.part(processes.members(len(batch)))
        return processes.gather(own.conditioning.combine(network(own.inputs).float()), len(batch))


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """A quantization method and its settings.

    Attributes:
        name: Name on the command line.
        trains: Whether the recipe trains after calibration; such a recipe has the settings `steps` and `batch`.
        distills: Whether training is `distill`: by gradients of the whole network, which may be accumulated, with activations computed again.
        starts_from_artifact: Whether `fit` accepts a student that an artifact describes, and then trains it without calibrating it: `Run.calibrates`.
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or 16 to leave activations in floating point.
        rows: Rows of the activation tables: the timesteps of sampling in that many steps. Source: EfficientDM, 100 steps.
        symmetric: Symmetric activation bounds below 8 bit; at 8 bit they are always symmetric.
        calibration_samples: Trajectories that the ranges are observed on.
        eta: Share of fresh noise in the trajectories, 0 (DDIM, as most deployed samplers) to 1 (DDPM).
        guidance: Scale of classifier-free or embedded guidance; 1 is off. None is the usual scale of the model.
        seed: Seed of all random numbers.
        rotate: Linear layers of attention and feed-forward networks whose input is rotated in blocks: none, all, or those in which it lowers the error of the
            output (`calibration/observers/rotation.py`). Source: QuaRot, arXiv 2404.00456; ConvRot, arXiv 2512.03673.
        rotate_block: Channels of a block, a power of two; 0 is the largest that divides the layer's input channels, at most 256.
    """

    name: ClassVar[str]
    trains: ClassVar[bool] = False
    distills: ClassVar[bool] = False
    starts_from_artifact: ClassVar[bool] = False

    weight_bits: int = 8
    act_bits: int = 8
    rows: int = 100
    symmetric: bool = False
    calibration_samples: int = 32
    eta: float = 0.0
    guidance: float | None = None
    seed: int = 0
    rotate: Rotate = "off"
    rotate_block: int = 0

    def __post_init__(self) -> None:
        if self.weight_bits not in WEIGHT_BITS:
            raise InputError(
                f"weight_bits is {self.weight_bits}; expected {WEIGHT_BITS.start} to {WEIGHT_BITS.stop - 1}. Set another --weight-bits."
            )
        if self.act_bits not in ACTIVATION_BITS and self.act_bits != WEIGHT_ONLY_BITS:
            raise InputError(
                f"act_bits is {self.act_bits}; expected {ACTIVATION_BITS.start} to {ACTIVATION_BITS.stop - 1}, "
                f"or {WEIGHT_ONLY_BITS} to leave activations in floating point. Set another --act-bits."
            )
        check_seed(self.seed)
        at_least("rows", self.rows, 1)
        at_least("calibration_samples", self.calibration_samples, 1)
        within("eta", self.eta, 0.0, 1.0)
        if self.guidance is not None:
            at_least("guidance", self.guidance, 0.0)
        if self.rotate not in get_args(Rotate):
            raise InputError(f"rotate is {self.rotate!r}; expected one of {', '.join(get_args(Rotate))}. Set another rotate.")
        if self.rotate_block and not is_block(self.rotate_block):
            raise InputError(
                f"rotate_block is {self.rotate_block}; expected a power of two, 2 to {MAX_BLOCK}, or 0 for the largest that fits. Set another rotate_block."
            )

    def layer_spec(self, site: str, placement: Placement) -> LayerSpec:
        """Bit widths of a site: the recipe's, or W8A8 where the family keeps 8 bit. Recipes that mix bits also use the name `site`."""
        act_bits = None if self.act_bits == WEIGHT_ONLY_BITS else self.act_bits
        if placement == "w8a8":
            return W8A8 if act_bits else LayerSpec(8, None, True)
        return LayerSpec(self.weight_bits, act_bits, self.symmetric or act_bits == 8)

    def structure(self, source: Source) -> NetworkRewrite:
        """Layers whose input is split into segments with separate quantizers; called before the student exists.

        Pre-scales are set on the student instead, and the setting `rotate` rotates what this leaves.
        """
        return PUBLISHED

    @abstractmethod
    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """Scale of each output channel, float32 [Cout], each > 0, for `weight`, float32 [Cout, ...]."""

    @abstractmethod
    def activation_range(self, observed: ActivationSamples, spec: LayerSpec) -> QuantRange:
        """The range of one table row, from the activation samples observed at it."""

    @abstractmethod
    def fit(self, context: TrainingContext) -> None:
        """Set the student's ranges and scales, and train what the method trains; in place."""

    def student(
        self,
        source: Source,
        timesteps: Tensor,
        device: torch.device,
        *,
        teacher: Teacher | None = None,
        folded: tuple[str, ...] = (),
        structure: NetworkRewrite = PUBLISHED,
        specs: Mapping[str, LayerSpec] | None = None,
    ) -> Student:
        """A student with this recipe's weight scales and, where `specs` has none for a site, its bits; the other arguments are those of `Student`."""

        def layer_spec(site: str, placement: Placement) -> LayerSpec:
            return specs[site] if specs is not None and site in specs else self.layer_spec(site, placement)

        return Student(source, layer_spec, self.weight_scale, timesteps, device, teacher=teacher, folded=folded, structure=structure)

    def pool_size(self) -> int:
        """Number of samples in the trajectory pool."""
        return self.calibration_samples

    @property
    def corrects_bias(self) -> bool:
        """Whether calibration corrects biases for the mean output error of weight rounding."""
        return False

    @property
    def static(self) -> bool:
        """Whether all rows of a table are equal: one range for all timesteps."""
        return False

    @property
    def comparison_of_layers(self) -> str | None:
        """The setting without which training compares outputs of single layers with the float model's, `local_weight=0`; None if it does not compare any."""
        return None

    @property
    def cached_bytes(self) -> int:
        """Maximum bytes of activations that `fit` caches."""
        return 0

    def settings(self) -> dict[str, Any]:
        """Every setting by name, for provenance and checkpoints."""
        return asdict(self)
