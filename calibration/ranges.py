"""Scales and bounds from what was seen: the arithmetic that recipes choose from."""

from __future__ import annotations

import torch
from torch import Tensor

from calibration.recipe import Range, SiteSpec
from edm_deploy.quant import per_channel, weight_bounds

SMALLEST_SCALE = 1e-8  # of a channel or a tensor that is all zeros


def range_between(low: float, high: float, spec: SiteSpec) -> Range:
    """The range whose codes reach from `low` to `high`, widened to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if spec.fixed_qmin is not None:
        return Range(max(max(-low, high) / (spec.fixed_qmin + spec.levels), SMALLEST_SCALE), spec.fixed_qmin)
    scale = max((high - low) / spec.levels, SMALLEST_SCALE)
    return Range(scale, max(-spec.levels, min(0, round(low / scale))))


def least_squares_range(values: Tensor, low: float, high: float, spec: SiteSpec, *, steps: int = 80) -> Range:
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
    ends = torch.cat([at, torch.full_like(at[:, :1], len(ordered))], dim=1)
    starts = torch.cat([torch.zeros_like(at[:, :1]), at], dim=1)
    products = (codes * (sums[ends] - sums[starts])).sum(1)
    squares = (codes.double().square() * (ends - starts)).sum(1)
    best = int((scale.square() * squares - 2 * scale * products).argmin())
    return Range(float(scale[best]), int(qmin[best]))


def least_error_weight_scale(weight: Tensor, bits: int, *, exponent: float = 2.4, steps: int = 80) -> Tensor:
    """The scale of each output channel with the smallest `sum |W - Q(W)|^exponent`, of `steps` candidates.

    Args:
        weight: float32 [Cout, ...].
        bits: 2 to 8.
        exponent: Source: 2.4 as in EfficientDM's and Q-Diffusion's released code.
        steps: Scales to try, from one that clips nothing down to a fifth of it.

    Returns:
        float32 [Cout], each > 0.
    """
    qmin, qmax = weight_bounds(bits)
    flat = weight.detach().flatten(1)
    widest = (flat.abs().amax(1) / qmax).clamp(min=SMALLEST_SCALE)
    best, least = widest.clone(), torch.full_like(widest, float("inf"))
    for fraction in torch.linspace(1.0, 0.2, steps).tolist():
        scale = widest * fraction
        rounded = (flat / per_channel(scale, flat)).round_().clamp_(qmin, qmax).mul_(per_channel(scale, flat))
        error = rounded.sub_(flat).abs_().pow_(exponent).sum(1)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def widest_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """The scale of each output channel that clips nothing: float32 [Cout], from float32 [Cout, ...]."""
    return (weight.detach().flatten(1).abs().amax(1) / weight_bounds(bits)[1]).clamp(min=SMALLEST_SCALE)


def _candidates(low: float, high: float, spec: SiteSpec, steps: int) -> tuple[Tensor, Tensor]:
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
