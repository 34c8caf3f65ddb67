"""Sensitivity by dual variables: how hard a training presses the effect of each layer's rounding towards that at 8 bits.

Source: Hounie, Elenter and Ribeiro, Neural Networks with Quantization Constraints (PD-QAT), ICASSP 2023, arXiv 2210.15623; facts from the released code,
github.com/ihounie/pd-qat.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from calibration.observers.bit_budget import RAISED_BITS
from calibration.observers.sensitivity import raised
from calibration.recipe import Recipe, TrainingContext
from calibration.run.options import Progress
from calibration.student.student import Student
from edm_deploy.numerics.activation_table import table_rows
from edm_deploy.numerics.codes import per_channel

# Rate of the dual variables, times the number of steps: a layer of a tenth of all effects ends at 0.6. Source: 0.01 an epoch, for 100 epochs about 1. With
# less, the constraints would not count beside the loss in a short training; with a rate that is the same for any length, a long one would be theirs alone.
DUAL_REACH = 6.0


@dataclass(frozen=True, kw_only=True)
class DualSensitivity:
    """Dual variables of the sites that read one tensor.

    Attributes:
        sites: Sites that change together, in the model's order.
        duals: The dual variable of each, >= 0.
    """

    sites: tuple[str, ...]
    duals: tuple[float, ...]

    @property
    def gain(self) -> float:
        """Their sum: the constraints are on effects in one unit."""
        return sum(self.duals)


class LayerConstraints:
    """One constraint for each layer, `effect of its rounding <= bound`, with a dual variable; an auxiliary loss, the sum of dual variable * slack.

    The rounding of a layer is `d = z_q - z`: its output less that of the float layer on the same input, which is the quantized network's. Its effect is the
    squared change of the prediction that d makes to first order, `E w |J d|^2` with the Jacobian J of the prediction by the layer's output. One backward
    pass estimates it for all layers at once: `E (v J d)^2` for normal v of variance w. Gradients of the effect are those of d; J is taken as constant.

    Args:
        context: Student, teacher and pool.
        sites: The constrained layers.
        weights: float32 [R], the weight w of a squared error of the prediction at each row of the student.
        seed: Of v; not that of the pool, whose noise v would repeat.

    Attributes:
        bounds: float32 [S], largest effect that each constraint allows.
        duals: float32 [S], dual variables, >= 0; 0 at first.
        slacks: float32 [S], effects less bounds in the last forward pass of a training.
        unit: Unit of effects and bounds.
        scale: Unit of the dual variables in the loss.
    """

    modules: Sequence[str] = ()

    def __init__(self, context: TrainingContext, sites: Sequence[str], weights: Tensor, *, seed: int) -> None:
        self.student, self.trajectories, self.sites = context.student, context.trajectories, tuple(sites)
        self.floats: Mapping[str, nn.Module] = context.teacher.family.sites(context.teacher.model)
        self.weights = weights.to(context.trajectories.device)
        self.generator = torch.Generator().manual_seed(seed)
        self.bounds = torch.zeros(len(self.sites), device=context.trajectories.device)
        self.duals, self.slacks = torch.zeros_like(self.bounds), torch.zeros_like(self.bounds)
        self.unit, self.scale = 1.0, 1.0
        self._outputs: dict[str, tuple[Tensor, Tensor]] = {}
        self._prediction = self._noise = torch.zeros(0)

    @contextmanager
    def observed(self) -> Iterator[None]:
        """Within the context each forward pass of the student keeps what `effects` needs."""
        with ExitStack() as stack:
            for name in self.sites:
                stack.callback(self.student.layers[name].register_forward_hook(self._keep_output(name)).remove)
            stack.callback(self.student.register_forward_hook(self._keep_prediction).remove)
            yield
        self._outputs, self._prediction, self._noise = {}, torch.zeros(0), torch.zeros(0)

    def _keep_output(self, name: str) -> Callable[..., Tensor]:
        def keep(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            output = output if output.requires_grad else output.detach().requires_grad_()
            self._outputs[name] = output, output - self.floats[name](args[0]).to(output.dtype)
            return output

        return keep

    def _keep_prediction(self, _: nn.Module, args: tuple[Mapping[str, Tensor], ...], prediction: Tensor) -> None:
        weights = self.weights[table_rows(self.student.row_of_timestep, args[0]["timestep"]).to(self.weights.device)]
        noise = torch.randn(prediction.shape, generator=self.generator).to(prediction.device)
        self._prediction, self._noise = prediction, (noise * per_channel(weights.sqrt(), noise)).to(prediction.dtype)

    def effects(self) -> Tensor:
        """float32 [S], effects of the layers' rounding in the last forward pass, means over its samples."""
        outputs, roundings = zip(*(self._outputs[name] for name in self.sites), strict=True)
        gradients = torch.autograd.grad(self._prediction, outputs, self._noise, retain_graph=True, materialize_grads=True)
        changes = [(each * d).flatten(1).sum(1, dtype=torch.float32) for each, d in zip(gradients, roundings, strict=True)]
        return torch.stack([change.square().mean() for change in changes]) / self.unit

    def mean_effects(self, batch: int) -> Tensor:
        """float32 [S], effects over the samples of the pool, which stay where they are, `batch` at a time."""
        pool, first = self.trajectories, self.trajectories.next_index
        sizes = [min(batch, pool.size - start) for start in range(0, pool.size, batch)]
        total = torch.zeros_like(self.bounds)
        with torch.enable_grad():
            for size in sizes:
                self.student(pool.next_batch(size).inputs)
                total += self.effects().detach() * size / pool.size
        pool.next_index = first
        return total

    def statistics(self, teacher: Mapping[str, Tensor]) -> Tensor:
        """None."""
        return torch.zeros(0)

    def __call__(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor], statistics: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        slacks = self.effects() - self.bounds
        self.slacks = slacks.detach()
        return self.scale * (self.duals * slacks).sum()

    def ascend(self, rate: float) -> None:
        """Take one step of the dual variables along the slacks."""
        self.duals = torch.relu(self.duals + rate * self.slacks)


def dual_sensitivities(
    context: TrainingContext, recipe: Recipe, groups: Sequence[tuple[str, ...]], *, weights_too: bool, row_weights: Tensor
) -> list[DualSensitivity]:
    """Calibrate and train a student with constraints on its layers; the dual variables at the end are the sensitivities.

    The Lagrangian, the recipe's loss and the sum of dual variable * slack, is descended in all that the recipe trains, and after each step ascended in the
    dual variables: `dual = max(dual + rate * slack, 0)`, rate = `DUAL_REACH` / steps. The bound of a layer is the effect that its rounding has at 8 bits
    before training, so that the dual variable of a layer that 8 bits would not help stays 0.

    Deviations from the source: the objective is the recipe's, the error of the quantized prediction, where the source has the loss of the float
    network and a constraint on the quantized output. The distance of two outputs of a layer is the effect on the prediction, relative to the sum of
    all effects before training, where the released code has the mean square of `d`, which weighs layers of all scales and places alike: relative to
    the output's energy it gives `up_blocks.2.resnets.1.conv2` of the reference model, the layer of most gain by forward passes, the sixth smallest of
    43 dual variables. Bounds are the effects at 8 bits, where the code has 1 / 255. The float layer is the teacher's. Dual variables move after each
    step, on the slacks of its batch, not after each epoch on those of all data, and are in units of the first step's loss.

    Args:
        context: A student whose weight scales are set, which is calibrated and trained; the teacher; and a new pool of the recipe's batch or more.
        recipe: One that distills, with the number of primal-dual steps as its `steps`.
        groups: As from `groups_to_raise`.
        weights_too: Whether sites at 8 bits have 8-bit weights too.
        row_weights: As in `PredictionError`.

    Raises:
        InputError: The loss is not finite.
        Interrupted: SIGINT or SIGTERM.
    """
    student, batch = context.student, recipe.settings()["batch"]
    sites = [site for group in groups for site in group]
    constraints = LayerConstraints(context, sites, row_weights, seed=recipe.seed + 1)
    published: dict[str, Tensor | None] = {name: layer.layer.bias for name, layer in student.layers.items()}
    student.add_wide_tables(RAISED_BITS)

    def set_bounds() -> None:
        constraints.unit = max(float(constraints.mean_effects(batch).sum()), 1e-12)
        with biases(student, published), raised([student.layers[site] for site in sites], recipe, weights_too=weights_too):
            constraints.bounds = constraints.mean_effects(batch)

    def after_step(progress: Progress) -> None:
        if progress.stage == "finetune":
            if progress.step == 1:  # all dual variables are 0: the recipe's own loss
                constraints.scale = progress.loss or 1.0
            constraints.ascend(DUAL_REACH / progress.total)
            progress = replace(progress, stage="sensitivity")
        context.run.on_progress(progress)

    # Infinite: the Lagrangian rises with the dual variables, so that its rise above the first loss is no divergence.
    notes = {"first_loss": math.inf}
    run = replace(context.run, on_progress=after_step, after_calibration=set_bounds, notes=notes)
    with constraints.observed():
        recipe.fit(replace(context, run=run, terms=(constraints,)))
    duals = dict(zip(sites, constraints.duals.tolist(), strict=True))
    return [DualSensitivity(sites=group, duals=tuple(duals[site] for site in group)) for group in groups]


@contextmanager
def biases(student: Student, values: Mapping[str, Tensor | None]) -> Iterator[None]:
    """Within the context the student's layers have these biases by name: corrected for the rounding of 4-bit weights, they are wrong for 8 bits."""
    before = {name: layer.layer.bias for name, layer in student.layers.items()}
    for name, layer in student.layers.items():
        layer.layer.bias = values[name]
    try:
        yield
    finally:
        for name, layer in student.layers.items():
            layer.layer.bias = before[name]
