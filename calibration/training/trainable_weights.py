"""Weights and biases that are trained directly, without a low-rank update."""

from __future__ import annotations

from torch import nn

from calibration.student.layers import StudentLayer


def detach_weight(layer: StudentLayer) -> nn.Parameter:
    """Replace the layer's float weight, which may be shared with the teacher, by a separate parameter for training; returns it."""
    layer.layer.weight = nn.Parameter(layer.layer.weight.detach().float().clone(), requires_grad=False)
    return layer.layer.weight


def detach_bias(layer: StudentLayer) -> nn.Parameter | None:
    """Replace the layer's bias in the same way; returns None if there is none."""
    if layer.layer.bias is None:
        return None
    layer.layer.bias = nn.Parameter(layer.layer.bias.detach().float().clone(), requires_grad=False)
    return layer.layer.bias


def mean_scale(layer: StudentLayer) -> float:
    """Mean weight scale of a layer, i.e. one step of its codes: the unit of learning rates (EfficientDM, arXiv 2310.03270, scale-aware optimization)."""
    return float(layer.log_weight_scale.detach().exp().mean())
