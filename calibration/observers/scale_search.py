"""Search for scales and bounds of weights and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.student.quantization_spec import LayerSpec, QuantRange
from edm_deploy.numerics.codes import weight_bounds

SMALLEST_SCALE = 1e-8  # scale of a channel or a tensor that is all zeros
CHUNK = 1 << 18  # weights searched at a time: two buffers of 1 MiB stay in a core's cache
SAMPLE = 512  # weights of a channel that locate the minimum,
LARGEST = 16  # with the largest ones in addition
COARSE = 5  # every fifth candidate is evaluated on the sample
FINE = (-4, -2, 0, 2, 4)  # offsets from the best of these, evaluated on all weights


def range_between(low: float, high: float, spec: LayerSpec) -> QuantRange:
    """The range whose codes span `low` to `high`, extended to contain 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.fixed_qmin is not None:
        return QuantRange(max(max(-low, high) / (spec.fixed_qmin + spec.levels), SMALLEST_SCALE), spec.fixed_qmin)
    scale = max((high - low) / spec.levels, SMALLEST_SCALE)
    return QuantRange(scale, max(-spec.levels, min(0, round(low / scale))))


def least_squares_range(
    values: Tensor, low: float, high: float, spec: LayerSpec, *, clip_weight: float = 1.0, steps: int = 80
) -> QuantRange:
    """The range with the smallest squared rounding error on `values`, among `steps` scales for each candidate lowest code.

    The error of a candidate is summed code by code from prefix sums over the sorted values, so its cost does not depend on their number.

    Args:
        values: float32 [N].
        low: Lower end of the widest candidates.
        high: Upper end of the widest candidates.
        spec: Bits and symmetry.
        clip_weight: Factor of the squared error of clipped values, 1 or more.
        steps: Scales to try, from the widest down to a twentieth of it.
    """
    if high <= low:
        return range_between(low, high, spec)
    qmin, scale = _candidates(low, high, spec, steps)
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    # Thresholds between neighbouring codes; prefix sums at them give each code's count and sum.
    codes = qmin[:, None] + torch.arange(spec.levels + 1)
    position = torch.searchsorted(ordered, ((codes[:, :-1] + 0.5) * scale[:, None]).contiguous())
    first, last = torch.zeros_like(position[:, :1]), torch.full_like(position[:, :1], len(ordered))
    counts = torch.cat([first, position, last], dim=1).diff()
    totals = torch.cat([first, sums[position], sums[-1].expand(len(position), 1)], dim=1).diff()
    products = (codes * totals).sum(1)
    squares = (codes.double().square() * counts).sum(1)
    error = scale.square() * squares - 2 * scale * products
    if clip_weight != 1:
        error += (clip_weight - 1) * _clipping_error(ordered, sums, codes[:, 0] * scale, codes[:, -1] * scale, scale)
    best = int(error.argmin())
    return QuantRange(float(scale[best]), int(qmin[best]))


def _clipping_error(ordered: Tensor, sums: Tensor, lowest: Tensor, highest: Tensor, scale: Tensor) -> Tensor:
    """Squared error of the values that are clipped to each candidate's range, those more than half a step outside it: float64 [N]."""
    squares = torch.cat([ordered.new_zeros(1), ordered.square().cumsum(0)])
    below, above = torch.searchsorted(ordered, lowest - scale / 2), torch.searchsorted(ordered, highest + scale / 2)
    of_below = squares[below] - 2 * lowest * sums[below] + lowest.square() * below
    of_above = squares[-1] - squares[above] - 2 * highest * (sums[-1] - sums[above]) + highest.square() * (len(ordered) - above)
    return of_below + of_above


def least_error_weight_scale(weight: Tensor, bits: int, *, exponent: float = 2.4, steps: int = 80) -> Tensor:
    """The scale of each output channel with the smallest `sum |W - Q(W)|^exponent`, among `steps` candidates.

    The error is nearly a parabola around its minimum, so a sample of each channel locates it and the whole channel refines it; compared with
    evaluating every candidate on all weights this costs a tenth of the time, and at most two percent of the error.

    Args:
        weight: float [Cout, ...]; processed in float32, a block of channels at a time.
        bits: 2 to 8.
        exponent: Source: 2.4 as in EfficientDM's and Q-Diffusion's released code.
        steps: Scales to try, from one that clips nothing down to a fifth of it.

    Returns:
        float32 [Cout], each > 0.
    """
    fractions = torch.linspace(1.0, 0.2, steps, device=weight.device)
    channels = max(1, CHUNK // max(1, weight[0].numel()))
    scales = []
    for chunk in torch.split(weight.detach(), channels):
        flat = chunk.flatten(1).float()
        widest = (flat.abs().amax(1) / weight_bounds(bits)[1]).clamp(min=SMALLEST_SCALE)
        coarse = torch.arange(0, steps, COARSE, device=weight.device)[:, None].expand(-1, len(flat))
        estimate = sum(share * _errors(part, widest, fractions[coarse], bits, exponent) for part, share in _sample(flat))
        nearest = coarse[:, 0][torch.as_tensor(estimate).argmin(0)]
        fine = torch.stack([nearest + offset for offset in FINE] + [torch.zeros_like(nearest)]).clamp(0, steps - 1)
        best = _errors(flat, widest, fractions[fine], bits, exponent).argmin(0)
        scales.append(widest * fractions[fine.gather(0, best[None])[0]])
    return torch.cat(scales)


def _sample(flat: Tensor) -> list[tuple[Tensor, float]]:
    """Parts of `flat`, float32 [Cout, N], and the weight of each part's error: the largest weights, which are clipped first, and a subset of the others."""
    count = flat.shape[1]
    if count <= 2 * SAMPLE:
        return [(flat, 1.0)]
    body = flat[:, :: count // SAMPLE].contiguous()
    magnitude = flat.abs().topk(LARGEST, dim=1)
    body = body.masked_fill(body.abs() >= magnitude.values[:, -1:], 0.0)
    return [(body, count / body.shape[1]), (flat.gather(1, magnitude.indices), 1.0)]


def _errors(flat: Tensor, widest: Tensor, fractions: Tensor, bits: int, exponent: float) -> Tensor:
    """Rounding error of each channel at scale `widest * fractions`: float32 [C, Cout] of float32 [Cout, N], [Cout] and [C, Cout]."""
    qmin, qmax = weight_bounds(bits)
    position, codes = torch.empty_like(flat), torch.empty_like(flat)
    errors = []
    for fraction in fractions:
        scale = widest * fraction
        torch.mul(flat, (1 / scale)[:, None], out=position)
        torch.round(position, out=codes)
        errors.append(position.sub_(codes.clamp_(qmin, qmax)).abs_().pow_(exponent).sum(1) * scale**exponent)
    return torch.stack(errors)


def widest_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale of each output channel that clips nothing: float32 [Cout], from float [Cout, ...]."""
    lowest, highest = torch.aminmax(weight.detach().flatten(1), dim=1)
    return (torch.maximum(-lowest, highest).float() / weight_bounds(bits)[1]).clamp(min=SMALLEST_SCALE)


def _candidates(low: float, high: float, spec: LayerSpec, steps: int) -> tuple[Tensor, Tensor]:
    """Lowest code int64 [N] and scale float64 [N] of every candidate: for each lowest code, decreasing scales from one that spans both ends."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.fixed_qmin is not None:
        lowest = torch.tensor([spec.fixed_qmin])
    else:
        centre, spread = spec.levels * low / (high - low), max(8.0, spec.levels / 4)
        first, last = max(-spec.levels, round(centre - spread)), min(0, round(centre + spread))
        lowest = torch.linspace(first, last, min(32, last - first + 1)).round().long()
    above = torch.where(lowest + spec.levels > 0, high / (lowest + spec.levels).clamp(min=1), 0.0)
    below = torch.where(lowest < 0, low / lowest.clamp(max=-1), 0.0)
    widest = torch.maximum(above, below).clamp(min=SMALLEST_SCALE).double()
    scale = widest[:, None] * torch.linspace(1.0, 0.05, steps, dtype=torch.float64)
    return lowest.repeat_interleave(steps), scale.flatten()
