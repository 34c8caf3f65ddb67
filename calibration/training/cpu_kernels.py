"""Faster kernels for training in bfloat16 on a CPU, for two operations whose kernels in torch are slow there. In float32, and on GPUs, nothing changes.

- Attention over up to LONGEST tokens: products and a softmax, whose backward pass torch's flash attention takes several times as long for. Source of the
  arithmetic: Vaswani et al., arXiv 1706.03762, equation 1; the softmax computes in float32 and is rounded to bfloat16, as the inputs of the second product are.
- Group norm of small feature maps in channels_last: in contiguous memory and back.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

LONGEST = 512  # tokens: at 1024 the products are as slow as flash attention, and hold their probabilities in memory
LARGEST = 1024  # height x width below which torch's group norm in channels_last takes its slow path


def use_cpu_kernels(model: nn.Module) -> None:
    """Replace the two operations in the attentions and group norms of a model; in place."""
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            setattr(module, "forward", types.MethodType(group_norm, module))  # noqa: B010  # a method, so that a copy of the module has its own
        elif hasattr(module, "processor"):  # diffusers' attentions
            setattr(module, "forward", functools.partial(_with_products, module.forward))  # noqa: B010


class AttentionByProducts(TorchFunctionMode):
    """Within it, attention in bfloat16 on a CPU over up to LONGEST tokens, without mask, dropout or grouped heads, is computed by `attention`."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch.overrides.TorchFunctionMode."""
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and len(args) == 3 and not any(kwargs.get(name) for name in UNSUPPORTED):
            query, key, value = (_as_autocast(each) for each in args)
            if kwargs.get("attn_mask") is None and _is_slow(query, key):
                return attention(query, key, value, kwargs.get("scale"))
        return func(*args, **kwargs)


UNSUPPORTED = ("dropout_p", "is_causal", "enable_gqa")


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """`softmax(Q K^T scale) V`, all [B, heads, tokens, channels]; `scale` is by default channels^-0.5."""
    scores = (query * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)) @ key.transpose(-1, -2)
    return scores.softmax(-1) @ value


def group_norm(module: nn.GroupNorm, x: Tensor) -> Tensor:
    """The result of `module`; of a small feature map [B, C, H, W] in channels_last, computed in contiguous memory."""
    slow = x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.ndim == 4 and x.shape[2] * x.shape[3] < LARGEST
    if not slow or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return functional.group_norm(x, module.num_groups, module.weight, module.bias, module.eps)
    y = functional.group_norm(x.contiguous(), module.num_groups, module.weight, module.bias, module.eps)
    return y.contiguous(memory_format=torch.channels_last)


def _with_products(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with AttentionByProducts():
        return forward(*args, **kwargs)


def _as_autocast(x: Tensor) -> Tensor:
    """`x` in the dtype that autocast gives to attention."""
    return x.to(torch.get_autocast_dtype("cpu")) if x.device.type == "cpu" and torch.is_autocast_enabled("cpu") else x


def _is_slow(query: Tensor, key: Tensor) -> bool:
    return (
        query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.ndim == 4 and max(query.shape[-2], key.shape[-2]) <= LONGEST
    )
