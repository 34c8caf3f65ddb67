"""Weights and biases that are trained themselves, without a low-rank update between."""

from __future__ import annotations

from torch import nn

from calibration.student.layers import StudentLayer


def detach_weight(layer: StudentLayer) -> nn.Parameter:
    """The layer's float weight as a parameter of its own, for training: until now it may have been the teacher's too."""
    layer.layer.weight = nn.Parameter(layer.layer.weight.detach().float().clone(), requires_grad=False)
    return layer.layer.weight


def detach_bias(layer: StudentLayer) -> nn.Parameter | None:
    """Likewise its bias; None where it has none."""
    if layer.layer.bias is None:
        return None
    layer.layer.bias = nn.Parameter(layer.layer.bias.detach().float().clone(), requires_grad=False)
    return layer.layer.bias


def mean_scale(layer: StudentLayer) -> float:
    """The mean weight scale of a layer: one step of its codes, the unit of rates (EfficientDM, arXiv 2310.03270, scale-aware optimization)."""
    return float(layer.log_weight_scale.detach().exp().mean())
