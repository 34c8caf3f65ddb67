"""Bit allocation: inputs get 8 bits at the sites where that lowers the error of the prediction most for its cost, within a budget.

Source: sensitivity-based mixed precision as in MixDQ, Zhao et al., ECCV 2024, arXiv 2405.17873, and HAWQ, Dong et al., ICCV 2019, arXiv 1905.03696; dual
variables as in PD-QAT, Hounie et al., ICASSP 2023, arXiv 2210.15623.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from calibration.base_pass import Pass, PassContext, SitePrice, needs_quantized_inputs
from calibration.data.trajectory_pool import Trajectories
from calibration.observers.bit_budget import INT4_BITS, RAISED_BITS, Budget, choose, costs_of
from calibration.observers.dual_sensitivity import DualSensitivity, dual_sensitivities
from calibration.observers.sensitivity import Sensitivity, groups_to_raise, sensitivities
from calibration.recipe import Recipe, TrainingContext
from calibration.run.setting_checks import at_least
from calibration.student.quantization_spec import LayerSpec
from calibration.student.teacher import Teacher
from edm_deploy.errors import InputError
from edm_deploy.network.layer_costs import model_work
from edm_deploy.pipelines.noise_schedules import calibrated_timesteps
from edm_deploy.pipelines.step_weights import cached_step_weights

Measurement = Literal["forward", "dual"]


@dataclass(frozen=True, kw_only=True)
class Allocate(Pass):
    """The sensitivity of each site is measured, then the sites of most gain for their cost are raised until the budget is used up.

    Before the student exists, a student at the recipe's bits is calibrated, and the error of its prediction is measured with one group of sites at 8 bits
    at a time; a group are the sites that read one tensor, such as q, k and v. The squared error at each timestep counts by what it does to the final
    sample. What the error loses is the group's gain, and the knapsack problem of gains and costs is solved. Recipes that train then train with these bits.
    With `sensitivity=dual` the gain is the group's dual variable in a short training at the recipe's bits (`calibration/observers/dual_sensitivity.py`).

    Deviations from MixDQ: its score is the SQNR of one site quantized in a float network, with separate metrics for content and quality; here
    the other sites are quantized, and the error is that of the prediction.

    Attributes:
        budget: `int4=0.75`: at least this share of the multiply-accumulates of all quantized layers in INT4. `avg_act_bits=5.0`: at most so many
            bits of the inputs, averaged over the same. `time=0.9x`: at most this multiple of the expected time of these layers in INT8 on `gpu`.
        weights: Whether the weights of raised sites get 8 bits too. They then need twice the memory; the arithmetic is INT8 in either case.
        sensitivity: `forward`: one forward pass for each group, on the samples. `dual`: the dual variables of a training with one constraint for each site, for
            recipes that train the whole network.
        dual_steps: Steps of that training, with the recipe's batches.
        rows: Timesteps of the measurement, those of sampling in as many steps.
        samples: Samples of the measurement, spread evenly over the rows.
        gpu: GPU of a budget of time: rtx3090, rtx4090, a100 or h200.
        batch: Samples per call, for a budget of time.
    """

    name: ClassVar[str] = "allocate"
    budget: str = "int4=0.75"
    weights: bool = True
    sensitivity: Measurement = "forward"
    dual_steps: int = 60
    rows: int = 10
    samples: int = 20
    gpu: str = "rtx3090"
    batch: int = 8

    def __post_init__(self) -> None:
        Budget.parse(self.budget)
        if self.sensitivity not in get_args(Measurement):
            raise InputError(
                f"allocate.sensitivity is {self.sensitivity!r}; expected {' or '.join(get_args(Measurement))}. Set another allocate.sensitivity."
            )
        for name in ("rows", "samples", "batch", "dual_steps"):
            at_least(f"allocate.{name}", getattr(self, name), 1)

    def check(self, recipe: Recipe, others: Sequence[Pass]) -> None:
        """Refuse recipes whose inputs have 8 bits already or are not quantized, and budgets of INT4 work for recipes that have none."""
        needs_quantized_inputs(self, recipe)
        if recipe.act_bits >= RAISED_BITS:
            raise InputError(
                f"Pass 'allocate' has nothing to raise: act_bits is {recipe.act_bits}. Set act_bits to 7 or fewer, or leave the pass out."
            )
        if self.sensitivity == "dual" and not recipe.distills:
            raise InputError(
                f"allocate.sensitivity dual: recipe {recipe.name!r} {'reconstructs blocks' if recipe.trains else 'does not train'}; expected one that trains "
                "the whole network, such as efficientdm. Set allocate.sensitivity=forward, or another recipe."
            )
        measure = Budget.parse(self.budget).measure
        if measure != "avg_act_bits" and max(recipe.weight_bits, recipe.act_bits) > INT4_BITS:
            raise InputError(
                f"allocate.budget {self.budget}: at W{recipe.weight_bits}A{recipe.act_bits} no work is in INT4. "
                f"Set weight_bits and act_bits to {INT4_BITS} or fewer, or a budget of avg_act_bits."
            )

    def specs(self, context: PassContext, planned: Mapping[str, LayerSpec]) -> Mapping[str, LayerSpec]:
        """The planned bits with 8 at the sites that the budget pays for."""
        groups, budget = groups_to_raise(context, planned), Budget.parse(self.budget)
        work = model_work(context.source.family_object, context.source.config, context.structure)
        prices: Mapping[str, SitePrice] = {}
        if budget.measure == "time":
            if context.prices is None:
                raise InputError(
                    f"allocate.budget {self.budget} needs expected times of layers, and this caller of fit gives none. Set another budget."
                )
            prices = context.prices(work, self.gpu, self.batch)
        # Before the measurement: a budget that cannot be met is refused at once.
        costs = costs_of(budget, planned, groups, {name: site.macs for name, site in work.sites.items()}, prices)
        measure = self.measure_duals if self.sensitivity == "dual" else self.measure
        gains = [each.gain for each in measure(context, planned, groups)]
        raised = {site for index in choose(gains, costs) for site in groups[index]}
        return {name: self.raised(spec) if name in raised else spec for name, spec in planned.items()}

    def measure(self, context: PassContext, planned: Mapping[str, LayerSpec], groups: Sequence[tuple[str, ...]]) -> list[Sensitivity]:
        """The sensitivity of each group of sites, those of `groups_to_raise`, by forward passes."""
        training, weights = self.prepared(context, planned, size=self.samples)
        return sensitivities(training, context.recipe, groups, weights_too=self.weights, row_weights=weights)

    def measure_duals(
        self, context: PassContext, planned: Mapping[str, LayerSpec], groups: Sequence[tuple[str, ...]]
    ) -> list[DualSensitivity]:
        """The same by the dual variables of `dual_steps` steps of the recipe's training."""
        settings: dict[str, Any] = {"steps": self.dual_steps}  # of every recipe that distills
        recipe = replace(context.recipe, **settings)
        training, weights = self.prepared(context, planned, size=max(self.samples, recipe.settings()["batch"]))
        return dual_sensitivities(training, recipe, groups, weights_too=self.weights, row_weights=weights)

    def prepared(self, context: PassContext, planned: Mapping[str, LayerSpec], *, size: int) -> tuple[TrainingContext, Tensor]:
        """What is measured on, with a new pool of `size` samples, and the weights of its rows: float32 [R]."""
        source, recipe, device = context.source, context.recipe, context.device
        timesteps = calibrated_timesteps(source.scheduler, self.rows, source.family_object.sigmas(self.rows))
        teacher = Teacher(source, device)
        student = recipe.student(
            source, timesteps, device, teacher=teacher, folded=context.folded, structure=context.structure, specs=planned
        )
        trajectories = Trajectories(
            source, timesteps, size=size, eta=recipe.eta, seed=recipe.seed, device=device, conditioner=context.conditioner
        )
        digest = context.run.identity.get("teacher") or source.digest()
        weights = cached_step_weights(teacher.model, teacher, trajectories.schedule, context.conditioner, digest=digest, device=device)
        run = replace(context.run, options=replace(context.run.options, device=device.type), identity={"teacher": digest})
        # In the order of rows, which ascend with the timestep.
        return TrainingContext(student, teacher, trajectories, run), weights.flip(0)

    def raised(self, spec: LayerSpec) -> LayerSpec:
        """The bits of a raised site."""
        return replace(spec, weight_bits=RAISED_BITS if self.weights else spec.weight_bits, act_bits=RAISED_BITS, symmetric=True)


PASS = Allocate
