"""Sensitivity: how much of the error of the quantized prediction each site causes, by one forward pass for each site and width."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calibration.base_pass import PassContext
from calibration.data.trajectory_pool import FORWARD_BATCH, Batch
from calibration.observers.bit_budget import RAISED_BITS
from calibration.observers.calibrate import calibrate
from calibration.recipe import Recipe, TrainingContext
from calibration.run.options import Interrupted
from calibration.run.progress import ProgressMeter
from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec
from edm_deploy.network.layer_costs import model_work
from edm_deploy.numerics.activation_table import table_rows


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """What the bits of the sites that read one tensor do to the prediction.

    Attributes:
        sites: Sites that change together, in the model's order.
        error: Error of the prediction with every site at its own bits.
        raised_error: The same with these sites at 8 bits.
    """

    sites: tuple[str, ...]
    error: float
    raised_error: float

    @property
    def gain(self) -> float:
        """Error that more bits remove; 0 where they remove none."""
        return max(self.error - self.raised_error, 0.0)


def groups_to_raise(context: PassContext, specs: Mapping[str, LayerSpec]) -> list[tuple[str, ...]]:
    """The groups of sites whose inputs can have more bits: those of fewer than 8 that read one tensor, in the model's order."""
    shared = model_work(context.source.family_object, context.source.config, context.structure).shared_input
    groups: dict[str, list[str]] = {}
    for name, spec in specs.items():
        if spec.act_bits is not None and spec.act_bits < RAISED_BITS:
            groups.setdefault(shared.get(name, name), []).append(name)
    return [tuple(names) for names in groups.values()]


class PredictionError:
    """Error of a student's prediction on fixed samples.

    Args:
        context: Student, teacher and a pool, whose samples stay where they are.
        weights: float32 [R], weight of the squared error of a prediction at each row, such as the squared change of the final image that it makes; None
            divides by the teacher's sum of squares: the relative error.
    """

    def __init__(self, context: TrainingContext, weights: Tensor | None = None) -> None:
        trajectories, self.student = context.trajectories, context.student
        first = trajectories.next_index
        full, rest = divmod(trajectories.size, FORWARD_BATCH)
        self.batches = [trajectories.next_batch(size) for size in [FORWARD_BATCH] * full + [rest] * (rest > 0)]
        trajectories.next_index = first
        self.targets = [batch.conditioning.combine(context.teacher(batch.inputs)) for batch in self.batches]
        self.weights = [self._weights(batch, target, weights) for batch, target in zip(self.batches, self.targets, strict=True)]

    def _weights(self, batch: Batch, target: Tensor, weights: Tensor | None) -> Tensor:
        if weights is None:
            return 1 / target.square().flatten(1).sum(1)
        return weights.to(target.device)[table_rows(self.student.row_of_timestep, batch.timestep)]

    @torch.no_grad()
    def __call__(self) -> float:
        """Mean over the samples of the weighted squared error, summed over the elements of a sample."""
        total = torch.zeros((), dtype=torch.float64)
        for batch, target, weights in zip(self.batches, self.targets, self.weights, strict=True):
            difference = batch.conditioning.combine(self.student(batch.inputs).float()) - target
            total += (difference.square().flatten(1).sum(1) * weights).sum().cpu()
        return float(total) / sum(len(target) for target in self.targets)


@torch.no_grad()
def sensitivities(
    context: TrainingContext, recipe: Recipe, groups: Sequence[tuple[str, ...]], *, weights_too: bool, row_weights: Tensor | None = None
) -> list[Sensitivity]:
    """Calibrate a student, then measure the error with one group of sites at a time raised to 8 bits, all others at their own bits.

    Measured so rather than with one group quantized in a float network, because the errors of sites do not add up: on the reference model at W4A4 the
    allocations to a quarter of the work that follow from it reach 26.9 dB, and those from the float network 26.2 dB (without raising: 24.4 dB; mean of
    three seeds).

    Args:
        context: A student whose weight scales are set, the teacher, and a new pool. The student is calibrated; its bits do not change.
        recipe: Computes ranges and weight scales.
        groups: As from `groups_to_raise`.
        weights_too: Whether the weights are raised to 8 bits with the inputs.
        row_weights: As in `PredictionError`.

    Raises:
        Interrupted: SIGINT or SIGTERM.
    """
    student = context.student
    student.add_wide_tables(RAISED_BITS)
    biases = {name: layer.layer.bias for name, layer in student.layers.items()}
    calibrate(context, recipe)
    for name, layer in student.layers.items():
        layer.layer.bias = biases[name]  # corrected for the rounding of 4-bit weights, they would be wrong for those of 8 bits
    error, found = PredictionError(context, row_weights), []
    with ProgressMeter(context.run, "sensitivity", context.trajectories.device) as meter:
        base = error()
        for done, sites in enumerate(groups, start=1):
            with raised([student.layers[site] for site in sites], recipe, weights_too=weights_too):
                found.append(Sensitivity(sites=sites, error=base, raised_error=error()))
            meter.report(done, len(groups))
            if meter.interrupted:
                raise Interrupted("Interrupted while measuring sensitivities; nothing was written. Run the same command again.")
    return found


@contextmanager
def raised(layers: Sequence[StudentLayer], recipe: Recipe, *, weights_too: bool) -> Iterator[None]:
    """Within the context the inputs of these layers have 8 bits, and their weights too if so chosen."""
    before = [(layer.quantizer, layer.bits, layer.log_weight_scale) for layer in layers]
    for layer in layers:
        assert layer.quantizer is not None and layer.quantizer.relaxed is not None  # from `add_wide_tables`
        layer.quantizer = layer.quantizer.relaxed
        if weights_too:
            layer.bits = RAISED_BITS
            scale = recipe.weight_scale(layer.merged_weight(), RAISED_BITS)
            layer.log_weight_scale = nn.Parameter(scale.log(), requires_grad=False)
    try:
        yield
    finally:
        for layer, (quantizer, bits, log_scale) in zip(layers, before, strict=True):
            layer.quantizer, layer.bits, layer.log_weight_scale = quantizer, bits, log_scale
