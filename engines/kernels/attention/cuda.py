"""Launch attention's kernels on torch tensors. Same function as `cpu.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from engines.kernels import driver
from engines.kernels.attention.launch import CODE_TOKENS, AttentionParams, attention_launches, chunk_of, width_for
from engines.kernels.attention.operands import OCTET, AttentionOperands
from engines.kernels.cuda_ops import TYPE_NAMES

ALIGNMENT = 16  # bytes


def attention(operands: AttentionOperands) -> Tensor:
    """As `cpu.attention`. Views are read where tokens are contiguous and start at 16 bytes, as diffusers makes them; others are copied."""
    query, key, value = (_readable(x) for x in (operands.query, operands.key, operands.value))
    (batch, heads, length, elements), keys, device = query.shape, key.shape[2], query.device
    stored, chunk = width_for(elements).code_bytes, chunk_of(keys)
    tokens, chunks = -(-keys // CODE_TOKENS) * CODE_TOKENS, -(-keys // chunk)
    out = torch.empty((batch, length, heads, elements), dtype=query.dtype, device=device)
    # Referenced until the launch: the allocator reuses freed memory, in stream order.
    sums = torch.empty((batch, heads, chunks, elements), dtype=torch.float32, device=device)
    codes = torch.empty((batch, heads, tokens, stored), dtype=torch.uint8, device=device)
    scale = torch.empty((batch, heads, tokens), dtype=torch.float32, device=device)
    params = AttentionParams(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        out=out.data_ptr(),
        key_sums=sums.data_ptr(),
        key_codes=codes.data_ptr(),
        key_scale=scale.data_ptr(),
        H=heads,
        Lq=length,
        Lk=keys,
        D=elements,
        Cb=stored,
        tokens=tokens,
        chunk=chunk,
        chunks=chunks,
        factor=operands.factor,
    )
    for name, x in (("query", query), ("key", key), ("value", value)):
        for axis, stride in zip(("batch", "head", "token"), x.stride(), strict=False):
            setattr(params, f"{name}_{axis}", stride)
    driver.launch(attention_launches(params, batch=batch, type_name=TYPE_NAMES[query.dtype]), device)
    return out.transpose(1, 2)


def _readable(x: Tensor) -> Tensor:
    """`x` [B, H, L, D], or a copy where a token's elements are not neighbours or a token does not start at 16 bytes."""
    # The stride of an axis of one element is never used; torch may give any.
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
    aligned = x.data_ptr() % ALIGNMENT == 0 and all(stride % OCTET == 0 and stride < 2**31 for stride in strides)
    return x if x.stride(3) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
