"""SVDQuant: outliers of inputs moved to weights, the weights' leading singular vectors kept in a float branch, only the rest rounded to few bits.

Source: Li et al., SVDQuant, ICLR 2025, arXiv 2411.05007; constants from the released code, github.com/nunchaku-tech/deepcompressor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from calibration.data.observation import ActivationSamples
from calibration.observers.channel_scaling import scalable, stacked_weight
from calibration.observers.gptq import gptq
from calibration.observers.input_statistics import GROUP_BYTES, InputStatistics, input_statistics
from calibration.observers.low_rank import low_rank, rough_low_rank
from calibration.recipe import TrainingContext
from calibration.recipes.mpq_dm import smoothing_scales
from calibration.recipes.mse import LeastSquares
from calibration.run.options import Interrupted
from calibration.run.progress import ProgressMeter
from calibration.run.setting_checks import at_least, within
from calibration.student.layers import StudentLayer
from calibration.student.quantization_spec import LayerSpec
from calibration.student.student import Student
from edm_deploy.errors import InputError
from edm_deploy.network.low_rank_branch import LowRankBranch, largest_rank
from edm_deploy.network.restructure import NetworkRewrite, block_of, published_weight, representable, rotated_weight, weight_to_hold
from edm_deploy.network.rotation import rotate
from edm_deploy.numerics.codes import dequantize_weight, quantize_weight
from edm_deploy.pipelines.source import Source

Rounding = Literal["nearest", "gptq"]
POWERS = (0.25, 0.5, 0.75, 1.0)  # of a searched smoothing
SEARCH_ROWS = 6  # timesteps that a smoothing is judged at,
SEARCH_OUTPUTS = 128  # and output channels
NEEDED_GAIN = 0.97  # of the output's error, for which a layer's input is scaled


@dataclass(frozen=True, kw_only=True)
class SvdQuant(LeastSquares):
    """Smooths, decomposes and rounds every layer on its own, then calibrates activation tables by timestep.

    For an input x with scales p by channel: `y = Q(p x) Q(W / p - U D / p) + (x D) U`, with `U D / p` the leading singular vectors of `W / p`. A 3x3
    convolution's branch is a 3x3 convolution with `rank` outputs, whose kernels are the right singular vectors, and a 1x1 convolution.

    Deviations from the released code: weights have one scale per output channel and activations one per tensor and timestep, instead of one for each
    group of 64 inputs, which integer tensor cores cannot sum; convolutions have branches too; a branch's weights are rounded to float16 before the rest
    is computed, so that the rest corrects this rounding; the decomposition is not iterated; GPTQ's second moments contain the rounding error of the
    inputs; attention's matrix products stay in floating point.

    Attributes:
        rank: Largest rank of a branch; 0 for no branches. Source: 32.
        largest_share: Largest share of a layer's multiply-accumulates that its branch may add; the rank is lowered accordingly. Source: none, 32 is
            a few hundredths of the width of the published models.
        smoothing: Power of `max|X_c| / max|W_c|` that inputs are divided by; 0 is no smoothing. None searches the power, of this ratio or of `max|X_c|` alone,
            with the least error of each layer's output. Source: a search.
        rounding: How the rest is rounded: to `nearest`, or by `gptq`. Source: GPTQ.
    """

    name = "svdquant"
    weight_bits: int = 4
    act_bits: int = 4
    rank: int = 32
    largest_share: float = 0.25
    smoothing: float | None = None
    rounding: Rounding = "gptq"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("rank", self.rank, 0)
        within("largest_share", self.largest_share, 0.0, 1.0)
        if self.smoothing is not None:
            within("smoothing", self.smoothing, 0.0, 1.0)
        if self.rounding not in get_args(Rounding):
            raise InputError(f"rounding is {self.rounding!r}; expected {' or '.join(get_args(Rounding))}. Set another rounding.")

    @property
    def cached_bytes(self) -> int:
        """Statistics of the layers that are observed together."""
        return GROUP_BYTES

    def structure(self, source: Source) -> NetworkRewrite:
        """A branch for each layer at the recipe's bits whose share of the work allows a rank of 1 or more.

        Raises:
            InputError: The rank exceeds that of every layer.
        """
        family = source.family_object
        layers = {
            name: layer
            for name, layer in family.sites(source.model).items()
            if family.placement(name) == "quantize" and not (isinstance(layer, nn.Conv2d) and layer.groups > 1)
        }
        full = max(map(largest_rank, layers.values()), default=0)
        if self.rank > max(full, type(self).rank):
            raise InputError(f"rank is {self.rank}; the largest that a layer of this model can use is {full}. Set rank to {full} or less.")
        ranks = {name: rank_within(layer, self.rank, self.largest_share) for name, layer in layers.items()}
        return NetworkRewrite(branches={name: rank for name, rank in ranks.items() if rank})

    def fit(self, context: TrainingContext) -> None:
        """Decompose and round the weights, then calibrate."""
        self.decompose(context)
        super().fit(context)

    @torch.no_grad()
    def decompose(self, context: TrainingContext) -> None:
        """Set pre-scales, branches, weights and their scales of all layers at the recipe's bits."""
        student = context.student
        shared = {name: student.shared_input_layers(name) for name in scalable(student)}
        alone = [name for name in student.layers if student.family.placement(name) == "quantize" and _ungrouped(student.layers[name])]
        units = shared | {name: (name,) for name in alone if not any(name in unit for unit in shared.values())}
        observed = input_statistics(context, list(units), moments=self.rounding == "gptq", seed=self.seed)
        smoothed = 0
        with ProgressMeter(context.run, "decompose", context.trajectories.device) as meter:
            for done, (name, inputs) in enumerate(observed, start=1):
                smoothed += self.set_unit(student, units[name], inputs, search=name in shared)
                meter.report(done, len(units))
                if meter.interrupted:
                    raise Interrupted("Interrupted while decomposing weights; nothing was written. Run the same command again.")
        context.run.notes.update(branches=len(student.branches), smoothed_inputs=smoothed)

    def set_unit(self, student: Student, names: Sequence[str], inputs: InputStatistics, *, search: bool) -> bool:
        """Smooth, decompose and round the layers with one input; returns whether the input is scaled."""
        layers = [student.layers[name] for name in names]
        branches = [student.branch_of(name) for name in names]
        ranks = [0 if branch is None else branch.rank for branch in branches]
        spec = student.specs[names[0]]
        tried = self.smoothings(inputs, stacked_weight(student, names[0])) if search else [None]
        best = self.best_smoothing(layers, ranks, inputs, tried, spec)
        if best is not None:
            student.set_pre_scale(names[0], best)
        noise = self.noise(inputs, best, spec, block_of(layers[0].layer))
        for layer, branch in zip(layers, branches, strict=True):
            self.set_layer(layer, branch, inputs, noise)
        return best is not None

    def smoothings(self, inputs: InputStatistics, weight: Tensor) -> list[Tensor | None]:
        """The pre-scales to try, float32 [Cin] each; None is none."""
        amax = inputs.ranges.amax()
        if self.smoothing is not None:
            return [representable(1 / smoothing_scales(amax, weight, self.smoothing))] if self.smoothing else [None]
        by_input = [smoothing_scales(amax, amax.new_ones(1, len(amax), 1), power) for power in POWERS]
        by_both = [smoothing_scales(amax, weight, power) for power in POWERS]
        return [None, *(representable(1 / scale) for scale in by_input + by_both)]

    def best_smoothing(
        self, layers: Sequence[StudentLayer], ranks: Sequence[int], inputs: InputStatistics, tried: Sequence[Tensor | None], spec: LayerSpec
    ) -> Tensor | None:
        """The pre-scale with the least squared error of the layers' outputs, with weights rounded to nearest."""
        if len(tried) == 1:
            return tried[0]
        errors = []
        for scale in tried:
            generator = torch.Generator().manual_seed(self.seed)  # the same for each, so that they differ by their scales alone
            x, rounded = self.quantized_vectors(inputs, scale, spec, block_of(layers[0].layer))
            total = 0.0
            for layer, rank in zip(layers, ranks, strict=True):
                weight = _flat_weight(layer, scale)
                rest = (weight - rough_low_rank(weight, rank, generator))[:: -(-len(weight) // SEARCH_OUTPUTS)]
                rest = rotated_weight(layer.layer, rest)
                weight_scale = self.weight_scale(rest, layer.bits)
                codes = quantize_weight(rest, weight_scale, layer.bits)
                total += float((rounded @ dequantize_weight(codes, weight_scale).T - x @ rest.T).square().sum())
            errors.append(total if scale is None else total / NEEDED_GAIN)
        return tried[min(range(len(tried)), key=errors.__getitem__)]

    def quantized_vectors(
        self, inputs: InputStatistics, scale: Tensor | None, spec: LayerSpec, block: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Input vectors at some of the rows, multiplied by a pre-scale and rotated in blocks, and the same rounded: float32 [V, N] each."""
        rows = torch.unique(inputs.rows)
        rows = rows[torch.linspace(0, len(rows) - 1, min(SEARCH_ROWS, len(rows))).round().long()]
        exact, rounded = [], []
        factor = torch.ones_like(inputs.ranges.low[0]) if scale is None else scale
        for row in rows.tolist():
            x = inputs.vectors[inputs.rows == row] * _by_input(factor, inputs.vectors.shape[1])
            low, high = (float(extreme) for extreme in ((inputs.ranges.low[row] * factor).min(), (inputs.ranges.high[row] * factor).max()))
            if block is not None:
                x = rotate(x, block)
                low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
            exact.append(x)
            if spec.act_bits is None:
                rounded.append(x)
                continue
            range_ = self.activation_range(ActivationSamples(x.flatten()[:: max(1, x.numel() >> 12)], low, high), spec)
            codes = (x / range_.scale).round().clamp(range_.qmin, range_.qmin + spec.levels)
            rounded.append(codes * range_.scale)
        return torch.cat(exact), torch.cat(rounded)

    def noise(self, inputs: InputStatistics, scale: Tensor | None, spec: LayerSpec, block: int | None = None) -> float:
        """Mean square of the rounding error of an input."""
        x, rounded = self.quantized_vectors(inputs, scale, spec, block)
        return float((rounded - x).square().mean())

    def set_layer(self, layer: StudentLayer, branch: LowRankBranch | None, inputs: InputStatistics, noise: float) -> None:
        """Move the leading singular vectors of a layer's weight to its branch, and round the rest. The layer's pre-scale is set."""
        size = layer.layer.weight[0].numel()
        factor = layer.layer.weight.new_ones(size, dtype=torch.float32) if layer.pre_scale is None else _by_input(layer.pre_scale, size)
        rest = _flat_weight(layer, layer.pre_scale)
        if branch is not None:
            down, up = low_rank(rest, branch.rank)
            branch.set_weights(down * factor, up)
            rest = rest - branch.product() / factor
        rest = rotated_weight(layer.layer, rest)
        layer.set_weight_scale(self.weight_scale(rest, layer.bits))
        if self.rounding == "gptq":
            moments, mean = inputs.moments * factor * factor[:, None], inputs.mean * factor
            if (block := block_of(layer.layer)) is not None:
                moments, mean = rotate(rotate(moments, block).T, block).contiguous(), rotate(mean, block)
            moments.diagonal().add_(noise)
            scale = layer.log_weight_scale.exp()
            rounded = dequantize_weight(gptq(rest, scale, layer.bits, moments), scale)
            if self.bias_correction and layer.layer.bias is not None:
                shift = (rest - rounded) @ mean
                layer.layer.bias = nn.Parameter(layer.layer.bias.float() + shift, requires_grad=False)
            rest = rounded
        held = weight_to_hold(layer.layer, rest.reshape(layer.layer.weight.shape))
        layer.layer.weight = nn.Parameter(held, requires_grad=False)


def rank_within(layer: nn.Conv2d | nn.Linear, rank: int, share: float) -> int:
    """The largest rank up to `rank` of a branch with at most this share of the layer's multiply-accumulates."""
    outputs, inputs = len(layer.weight), layer.weight[0].numel()
    return min(rank, largest_rank(layer), int(share * outputs * inputs / (outputs + inputs)))


def _ungrouped(layer: StudentLayer) -> bool:
    return isinstance(layer.layer, nn.Linear) or layer.layer.groups == 1


def _flat_weight(layer: StudentLayer, scale: Tensor | None) -> Tensor:
    """The float weight divided by a pre-scale and not rotated, float32 [Cout, N]."""
    weight = published_weight(layer.layer, layer.layer.weight.detach().float()).flatten(1)
    return weight if scale is None else weight / _by_input(scale, weight.shape[1])


def _by_input(scale: Tensor, size: int) -> Tensor:
    """A value for each input channel, repeated for each position of the kernel: float32 [N]."""
    return scale.repeat_interleave(size // len(scale))


RECIPE = SvdQuant
