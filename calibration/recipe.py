"""What a recipe is, and what it is run with: settings, options, progress, interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from edm_deploy.errors import EdmDeployError, InputError
from edm_deploy.family import Placement
from edm_deploy.quant import ACTIVATION_BITS, WEIGHT_BITS, symmetric_bounds
from edm_deploy.structure import PUBLISHED, Structure
from edm_deploy.target import WEIGHT_ONLY_BITS

if TYPE_CHECKING:
    from calibration.budget import Budget
    from calibration.observe import Observation
    from calibration.passing import Pass, Scene
    from calibration.student import Student, Teacher
    from calibration.trajectories import Trajectories
    from edm_deploy.pipelines import Source


class Interrupted(EdmDeployError):  # noqa: N818  # it is no error, and callers read `except Interrupted`
    """Ctrl-C was heeded; the message says what was saved and how to go on."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far the work has come.

    Attributes:
        stage: What is being done, `calibrate` or `finetune`.
        step: Steps done.
        total: Steps in all.
        loss: Of the last step; None where nothing is trained.
        rate: Steps a second.
        eta_seconds: Seconds left in this stage.
        memory_bytes: Peak memory of the process, or of the accelerator.
    """

    stage: str
    step: int
    total: int
    loss: float | None
    rate: float
    eta_seconds: float
    memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a run needs beside its settings; of these only the teacher's dtype and the prompts change what a finished run computes.

    Attributes:
        device: Where the student and the teacher live.
        teacher_dtype: Of the teacher's weights and activations while it leads the training.
        checkpoint: Directory for checkpoints; None writes none.
        resume: Whether to go on from `checkpoint`.
        checkpoint_every: Training steps between checkpoints.
        fold_time: Whether layers that see the timestep alone stay in floating point, for exporters to make a table of.
        prompts: What models that take text are told; None is the built-in list.
        budget_seconds: Wall time of calibration and training together; training then goes by the clock and not by a number of steps, and the
            run is not reproducible bit for bit. None trains as many steps as the recipe says.
    """

    device: str = "cpu"
    teacher_dtype: Literal["fp32", "bf16"] = "bf16"
    checkpoint: Path | None = None
    resume: bool = False
    checkpoint_every: int = 100
    # Measured on the reference model at W4A4: noise error 0.0199 with the table, 0.0197 without, and an artifact larger by a fifth.
    fold_time: bool = False
    prompts: Path | None = None
    budget_seconds: float | None = None

    def __post_init__(self) -> None:
        at_least("checkpoint_every", self.checkpoint_every, 1)
        if self.budget_seconds is not None and not self.budget_seconds > 0:
            raise InputError(f"budget_seconds is {self.budget_seconds}; expected above 0. Set another budget.")
        if self.resume and self.checkpoint is None:
            raise InputError("resume is set but there is no checkpoint directory to resume from. Name one, or start anew without --resume.")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run under way, as `Recipe.fit` sees it.

    Attributes:
        options: As the user gave them.
        identity: What a checkpoint must have been made with to be resumed: recipe, settings, teacher.
        on_progress: Called after each step.
        passes: What the recipe is composed with.
        scene: What they may look at; None where there are none.
        budget: Wall time, counted from the run's start; None where training goes by its number of steps.
        notes: What the recipe did that its settings do not tell, for the provenance: steps done under a budget and the like. Filled by `fit`.
    """

    options: RunOptions
    identity: dict[str, Any]  # json
    on_progress: Callable[[Progress], None]
    passes: tuple[Pass, ...] = ()
    scene: Scene | None = None
    budget: Budget | None = None
    notes: dict[str, Any] = field(default_factory=dict)  # json


@dataclass(frozen=True)
class SiteSpec:
    """What one site becomes.

    Attributes:
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or None where the input stays in floating point.
        symmetric: Whether the activation bounds are fixed, or the range may lie anywhere around 0.
    """

    weight_bits: int
    act_bits: int | None
    symmetric: bool

    @property
    def levels(self) -> int:
        """Number of activation codes less one."""
        if self.act_bits is None or self.act_bits == 8 or not self.symmetric:
            return (1 << (self.act_bits or 8)) - 1
        return 2 * symmetric_bounds(self.act_bits)[1]

    @property
    def fixed_qmin(self) -> int | None:
        """The lowest activation code where the bounds are fixed. At 8 bit int8's own, so that a graph needs no Clip."""
        if not self.symmetric or self.act_bits is None:
            return None
        return -128 if self.act_bits == 8 else symmetric_bounds(self.act_bits)[0]


KEPT8 = SiteSpec(weight_bits=8, act_bits=8, symmetric=True)


@dataclass(frozen=True)
class Range:
    """How one table row quantizes: `n = clip(round(x / scale), qmin, qmin + levels)`; scale > 0, qmin <= 0."""

    scale: float
    qmin: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A method and its settings. Observing is common to all; a method that trains overrides `fit`.

    Attributes:
        weight_bits: 2 to 8.
        act_bits: 3 to 8, or 16 to leave activations in floating point.
        rows: Rows of the activation tables: the timesteps of that many DDIM steps. Source: EfficientDM, 100 steps.
        symmetric: Symmetric activation bounds below 8 bit; at 8 bit they always are.
        calibration_samples: Trajectories that the ranges are observed on.
        eta: Fresh noise of the trajectories, 0 (DDIM, as most samplers that are deployed) to 1 (DDPM).
        guidance: Scale of classifier-free or embedded guidance; 1 is off. None is what the model's samples are usually drawn with.
        seed: Of everything random.
    """

    name: ClassVar[str]

    weight_bits: int = 8
    act_bits: int = 8
    rows: int = 100
    symmetric: bool = False
    calibration_samples: int = 32
    eta: float = 0.0
    guidance: float | None = None
    seed: int = 0

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
        at_least("rows", self.rows, 1)
        at_least("calibration_samples", self.calibration_samples, 1)
        within("eta", self.eta, 0.0, 1.0)
        if self.guidance is not None:
            at_least("guidance", self.guidance, 0.0)

    def specs(self, site: str, placement: Placement) -> SiteSpec:
        """What becomes of a site: the recipe's bits, or W8A8 where the family keeps 8. `site` is there for recipes that mix bits."""
        act_bits = None if self.act_bits == WEIGHT_ONLY_BITS else self.act_bits
        if placement == "keep8":
            return KEPT8 if act_bits else SiteSpec(8, None, True)
        return SiteSpec(self.weight_bits, act_bits, self.symmetric or act_bits == 8)

    def structure(self, source: Source) -> Structure:
        """The layers whose input is cut into segments that are quantized apart; asked before there is a student. Pre-scales are set on the student."""
        return PUBLISHED

    def weight_scale(self, weight: Tensor, bits: int) -> Tensor:
        """float32 [Cout], each > 0: the scale of each output channel of `weight`, float32 [Cout, ...]."""
        raise NotImplementedError

    def activation_range(self, observed: Observation, spec: SiteSpec) -> Range:
        """How one table row quantizes what was observed at it."""
        raise NotImplementedError

    def fit(self, student: Student, teacher: Teacher, trajectories: Trajectories, run: Run) -> None:
        """Set the student's ranges and scales, and train what the method trains; in place."""
        from calibration.observe import calibrate  # observe knows recipes by this module

        calibrate(student, teacher, trajectories, self, run)

    def pool_size(self) -> int:
        """Samples in flight."""
        return self.calibration_samples

    @property
    def corrects_bias(self) -> bool:
        """Whether calibration moves biases by what rounding the weights takes from the mean output."""
        return False

    @property
    def static(self) -> bool:
        """Whether all rows of a table are one: the range of what was observed at any of them."""
        return False

    @property
    def cached_bytes(self) -> int:
        """Bytes of activations that `fit` keeps at most."""
        return 0

    def settings(self) -> dict[str, Any]:
        """Every setting by name, for provenance and checkpoints."""
        return asdict(self)


def at_least(name: str, value: float, lowest: float) -> None:
    """Raises InputError where a setting is below its smallest legal value."""
    if not value >= lowest:
        raise InputError(f"{name} is {value}; expected at least {lowest}. Set another {name}.")


def within(name: str, value: float, lowest: float, highest: float) -> None:
    """Raises InputError where a setting is outside its legal range."""
    if not lowest <= value <= highest:
        raise InputError(f"{name} is {value}; expected {lowest} to {highest}. Set another {name}.")


def interrupted(run: Run, after: str) -> Interrupted:
    """What a run raises that heeds Ctrl-C, `after` what: it says where the state is and how to go on."""
    if run.options.checkpoint is None:
        return Interrupted(f"Interrupted after {after}; nothing was saved, because the run has no checkpoint directory.")
    return Interrupted(f"Interrupted after {after}; the state is in {run.options.checkpoint}. Run the same command with --resume to go on.")
