"""Scales and bounds from what was seen: the arithmetic that recipes choose from."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.student.quantization_spec import LayerSpec, QuantRange
from edm_deploy.numerics.codes import weight_bounds

SMALLEST_SCALE = 1e-8  # of a channel or a tensor that is all zeros
PIECE = 1 << 18  # weights searched at a time: two buffers of 1 MiB stay in a core's cache
SAMPLE = 512  # weights of a channel that find the neighbourhood of its best scale,
LARGEST = 16  # with its largest ones
COARSE = 5  # every fifth candidate is tried on the sample
FINE = (-4, -2, 0, 2, 4)  # around the best of these, on all weights


def range_between(low: float, high: float, spec: LayerSpec) -> QuantRange:
    """The range whose codes reach from `low` to `high`, widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.fixed_qmin is not None:
        return QuantRange(max(max(-low, high) / (spec.fixed_qmin + spec.levels), SMALLEST_SCALE), spec.fixed_qmin)
    scale = max((high - low) / spec.levels, SMALLEST_SCALE)
    return QuantRange(scale, max(-spec.levels, min(0, round(low / scale))))


def least_squares_range(values: Tensor, low: float, high: float, spec: LayerSpec, *, steps: int = 80) -> QuantRange:
    """The range with the smallest squared rounding error on `values`, of `steps` scales for each possible lowest code.

    The error of a candidate is summed code by code from prefix sums over the sorted values, so its cost does not depend on their number.

    Args:
        values: float32 [N].
        low: Where the widest candidates begin.
        high: Where they end.
        spec: Bits and symmetry.
        steps: Scales to try, from the widest down to a twentieth of it.
    """
    if high <= low:
        return range_between(low, high, spec)
    qmin, scale = _candidates(low, high, spec, steps)
    ordered = values.double().sort().values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    # Thresholds between neighbouring codes; prefix sums at them give each code's count and sum.
    codes = qmin[:, None] + torch.arange(spec.levels + 1)
    at = torch.searchsorted(ordered, ((codes[:, :-1] + 0.5) * scale[:, None]).contiguous())
    first, last = torch.zeros_like(at[:, :1]), torch.full_like(at[:, :1], len(ordered))
    counts = torch.cat([first, at, last], dim=1).diff()
    totals = torch.cat([first, sums[at], sums[-1].expand(len(at), 1)], dim=1).diff()
    products = (codes * totals).sum(1)
    squares = (codes.double().square() * counts).sum(1)
    best = int((scale.square() * squares - 2 * scale * products).argmin())
    return QuantRange(float(scale[best]), int(qmin[best]))


def least_error_weight_scale(weight: Tensor, bits: int, *, exponent: float = 2.4, steps: int = 80) -> Tensor:
    """The scale of each output channel with the smallest `sum |W - Q(W)|^exponent`, of `steps` candidates.

    The error is nearly a parabola about its minimum, so a sample of each channel finds the neighbourhood and all of it chooses there; against
    trying every candidate on everything that costs a tenth, and at most two percent of the error.

    Args:
        weight: float [Cout, ...]; a piece of its channels at a time is taken in float32.
        bits: 2 to 8.
        exponent: Source: 2.4 as in EfficientDM's and Q-Diffusion's released code.
        steps: Scales to try, from one that clips nothing down to a fifth of it.

    Returns:
        float32 [Cout], each > 0.
    """
    fractions = torch.linspace(1.0, 0.2, steps, device=weight.device)
    channels = max(1, PIECE // max(1, weight[0].numel()))
    found = []
    for piece in torch.split(weight.detach(), channels):
        flat = piece.flatten(1).float()
        widest = (flat.abs().amax(1) / weight_bounds(bits)[1]).clamp(min=SMALLEST_SCALE)
        coarse = torch.arange(0, steps, COARSE, device=weight.device)[:, None].expand(-1, len(flat))
        guess = sum(share * _errors(part, widest, fractions[coarse], bits, exponent) for part, share in _sample(flat))
        near = coarse[:, 0][torch.as_tensor(guess).argmin(0)]
        fine = torch.stack([near + offset for offset in FINE] + [torch.zeros_like(near)]).clamp(0, steps - 1)
        best = _errors(flat, widest, fractions[fine], bits, exponent).argmin(0)
        found.append(widest * fractions[fine.gather(0, best[None])[0]])
    return torch.cat(found)


def _sample(flat: Tensor) -> list[tuple[Tensor, float]]:
    """Parts of `flat`, float32 [Cout, N], and what each part's error counts: the largest weights, which are clipped first, and some of the others."""
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
    """Lowest code int64 [N] and scale float64 [N] of every candidate: for each lowest code, from the scale that reaches both ends downwards."""
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
