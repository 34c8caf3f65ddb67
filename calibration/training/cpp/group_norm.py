"""Group norm in bfloat16 on a CPU, channels last, with SiLU behind it where a model has one there."""

from __future__ import annotations

import ctypes
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from calibration.training.cpp.library import GroupNormParams, library


def use_cpp_norms(model: nn.Module) -> None:
    """Compute every group norm of a model by the kernel, in place, and the SiLU behind it by the same one in residual blocks and at the end of a UNet.

    Those SiLUs become the identity of feature maps; of embeddings, [B, C], they are computed as before.
    """
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            setattr(module, "forward", types.MethodType(_norm, module))  # noqa: B010  # a method, so that a copy of the module has its own
    for module in model.modules():
        norms, activation = activated_norms(module)
        for norm in norms:
            setattr(norm, "forward", types.MethodType(_activated_norm, norm))  # noqa: B010
        if activation is not None:
            setattr(activation, "forward", types.MethodType(_activate_embeddings, activation))  # noqa: B010


def activated_norms(module: nn.Module) -> tuple[list[nn.GroupNorm], nn.SiLU | None]:
    """The group norms of diffusers' residual block or UNet whose result goes through SiLU and nowhere else, and that SiLU; nothing of other modules."""
    found: list[object] = []
    activation: object = None
    if hasattr(module, "conv_norm_out"):
        found, activation = [module.conv_norm_out], getattr(module, "conv_act", None)
    elif getattr(module, "time_embedding_norm", None) == "default":  # `scale_shift` stands between the second norm and SiLU
        found, activation = [getattr(module, "norm1", None), getattr(module, "norm2", None)], getattr(module, "nonlinearity", None)
    norms = [norm for norm in found if isinstance(norm, nn.GroupNorm)]
    return (norms, activation) if found and len(norms) == len(found) and isinstance(activation, nn.SiLU) else ([], None)


def group_norm(x: Tensor, norm: nn.GroupNorm, *, silu: bool = False) -> Tensor:
    """The result of `norm`, and of SiLU behind it: [B, C, ...] in the dtype of `x`.

    Feature maps [B, C, H, W] in bfloat16 on a CPU, and tokens whose channels lie side by side, are computed by the kernel, in float32, and rounded once; maps become
    channels_last. All else is computed by torch.
    """
    kernel = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() > 0
    if kernel and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if kernel and _channels_last(x):
        result: Tensor = _GroupNorm.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)  # type: ignore[no-untyped-call]
        return result
    y = functional.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return functional.silu(y) if silu else y


def _channels_last(x: Tensor) -> bool:
    return x.ndim > 2 and x.movedim(1, -1).is_contiguous()


class _GroupNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float, silu: bool
    ) -> Tensor:  # Any: torch's context has no public type
        gamma = torch.ones(x.shape[1]) if weight is None else weight.detach().float().contiguous()
        beta = torch.zeros(x.shape[1]) if bias is None else bias.detach().float().contiguous()
        mean, rstd, y = torch.empty(len(x), groups), torch.empty(len(x), groups), torch.empty_like(x)
        ctx.settings = groups, eps, silu
        _run("edm_group_norm", ctx.settings, x, out=y, gamma=gamma, beta=beta, mean=mean, rstd=rstd)
        ctx.save_for_backward(x, gamma, beta, mean, rstd)
        ctx.dtypes = (None if weight is None else weight.dtype, None if bias is None else bias.dtype)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]  # torch leaves it untyped
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, mean, rstd = ctx.saved_tensors
        grad = torch.empty_like(x).copy_(grads[0]) if grads[0].dtype != x.dtype or not _channels_last(grads[0]) else grads[0]
        grad_x, grad_gamma, grad_beta = torch.empty_like(x), torch.empty(len(x), x.shape[1]), torch.empty(len(x), x.shape[1])
        tensors = {"grad": grad, "out": grad_x, "gamma": gamma, "beta": beta, "mean": mean, "rstd": rstd}
        _run("edm_group_norm_gradients", ctx.settings, x, **tensors, grad_gamma=grad_gamma, grad_beta=grad_beta)
        of_parameters = [
            sums.sum(0).to(dtype) if needed and dtype is not None else None
            for sums, dtype, needed in zip((grad_gamma, grad_beta), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        ]
        return grad_x, *of_parameters, None, None, None


def _run(kernel: str, settings: tuple[int, float, bool], x: Tensor, **tensors: Tensor) -> None:
    groups, eps, silu = settings
    addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    sizes = {"N": len(x), "HW": x[0, 0].numel(), "C": x.shape[1], "groups": groups, "silu": int(silu)}
    params = GroupNormParams(x=x.data_ptr(), eps=eps, **addresses, **sizes)
    getattr(library(), kernel)(ctypes.byref(params), min(torch.get_num_threads(), len(x)))


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm(x, norm)


def _activated_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return group_norm(x, norm, silu=True)


def _activate_embeddings(activation: nn.SiLU, x: Tensor) -> Tensor:
    return x if x.ndim == 4 else functional.silu(x)
