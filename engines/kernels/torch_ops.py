"""The kernels in plain torch on packed codes, bit for bit as `cuda/params.h` specifies.

For tests of everything above the kernels on a machine without a GPU. It is slow.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edm_deploy.numerics.kernel_layout import bits_of, pack_codes, unpack_codes
from engines.kernels.launch import OCTET, row_lanes
from engines.kernels.operands import LARGEST_CODE, ConvShape, Norm, Operands, RowNorm, Table

# Of gelu() in cuda/quantize.cuh, the lowest power first.
GELU_POLYNOMIAL = (
    0.14136378467082977, -0.0702962800860405, 0.05152052268385887, -0.040442608296871185, 0.031442172825336456,
    -0.023268653079867363, 0.016402173787355423, -0.011164339259266853, 0.006410510279238224, -0.002685575047507882,
    0.0017227994976565242, -0.001613265136256814, 0.0006087272777222097,
)  # fmt: skip


def quantize(x: Tensor, norm: Norm | None, table: Table, *, activation: str = "none", rotation: int = 0) -> Tensor:
    """Packed codes of an activation, uint8 [B, H, W, Cb].

    `round(v * inv_scale[row])`, half to even, then the bounds; all in float32. NaN becomes qmin, as with the GPU's max.

    Args:
        x: float16 or bfloat16 [B, C, H, W] or [B, ..., C].
        norm: Normalizes x first, each step rounded separately; None for no norm.
        table: Rows, scales and bounds.
        activation: From `checks.ACTIVATIONS`, applied after the norm. On a GPU `silu` and `gelu_tanh` have a relative error below 2^-19: a code may
            differ by a tie. `gelu` and `geglu` are the same bits. `geglu` reads [B, ..., 2C], the values before their gates.
        rotation: Channels of the blocks that are rotated after it; 0 is none.
    """
    values = pixels(x).float()
    if norm is not None:
        values = normed(values, norm)
    return codes_of(rotated(activated(values, activation), rotation), table)


def rotated(values: Tensor, block: int) -> Tensor:
    """`network.rotation.rotate` of float32 [..., C] in blocks of channels, summed in the order of `cuda/params.h`; 0 is none."""
    if block == 0:
        return values
    log, step = block.bit_length() - 1, 1
    if log % 2:
        a, b = values.unflatten(-1, (-1, 2)).unbind(-1)  # type: ignore[no-untyped-call]  # as below: torch leaves it untyped
        values, step = torch.stack([a + b, a - b], -1).flatten(-2), 2
    while step < block:
        x = values.unflatten(-1, (-1, 4, step))  # type: ignore[no-untyped-call]
        x = torch.stack([(x[..., i, :] + x[..., i ^ 1, :]) + (x[..., i ^ 2, :] - x[..., i ^ 3, :]) for i in range(4)], -2)
        values, step = x.flatten(-3), 4 * step
    return values * 2.0 ** -((log + 1) // 2)


def activated(values: Tensor, activation: str) -> Tensor:
    """An activation of float32 [..., C], as `cuda/quantize.cuh` computes it; `geglu` of [..., 2C]."""
    match activation:
        case "silu":
            return values / (1 + (-values).exp())
        case "gelu":
            return gelu(values)
        case "gelu_tanh":
            u = values * (1 + 0.044715 * (values * values))
            return values / (1 + (-1.5957691216 * u).exp())
        case "geglu":
            value, gate = values.chunk(2, dim=-1)
            return value * gelu(gate)
        case _:
            return values


def gelu(x: Tensor) -> Tensor:
    """GELU of float32, x * Phi(x), Phi by the polynomial of `cuda/quantize.cuh`, the same bits."""
    s = fused_multiply_add(x * x, x.new_tensor(0.08), x.new_tensor(-1.0))
    *coefficients, p = (x.new_tensor(coefficient) for coefficient in GELU_POLYNOMIAL)
    for coefficient in reversed(coefficients):
        p = fused_multiply_add(p, s, coefficient)
    inside = x * fused_multiply_add(x, p, x.new_tensor(0.5))
    return torch.where(x.abs() >= 5, x.clamp(min=0), inside)


def fused_multiply_add(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """The sum a * b + c of float32, rounded once.

    The product is exact in float64. The sum is rounded to odd there, which makes the second rounding, to float32, that of the exact sum.
    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Transactions on Computers 57(4), 2008.
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)  # of the sum, exact: Knuth's TwoSum
    even = (total.view(torch.int64) & 1) == 0
    toward = torch.where(error > 0, torch.inf, -torch.inf).double()
    return torch.where((error != 0) & even & total.isfinite(), torch.nextafter(total, toward), total).float()


def codes_of(values: Tensor, table: Table) -> Tensor:
    """Packed codes uint8 [B, H, W, Cb] of float32 [B, H, W, C]."""
    rows = table.rows.long()
    inv_scale, qmin, qmax = (column[rows].float()[:, None, None, None] for column in (table.inv_scale, table.qmin, table.qmax))
    codes = torch.fmin(torch.fmax((values * inv_scale).round(), qmin), qmax)
    return pack_codes((codes - qmin if table.unsigned else codes).to(torch.int8), table.bits)


def pixels(x: Tensor) -> Tensor:
    """An activation as [B, H, W, C]: a map [B, C, H, W] permuted to channels last, or [B, ..., C] with the middle axes as its height."""
    return x.permute(0, 2, 3, 1) if x.ndim == 4 else x.reshape(x.shape[0], -1, 1, x.shape[-1])


def normed(x: Tensor, norm: Norm) -> Tensor:
    """`((x - mean) * rstd) * gamma + beta` of float32 [B, H, W, C], by groups of channels."""
    per_group = x.shape[-1] // norm.mean.shape[1]
    mean, rstd = (column.repeat_interleave(per_group, dim=1)[:, None, None] for column in (norm.mean, norm.rstd))
    y = (x - mean) * rstd
    if norm.gamma is not None:
        y = y * norm.gamma
    return y if norm.beta is None else y + norm.beta


def quantize_rows(x: Tensor, norm: RowNorm, table: Table, *, rotation: int = 0) -> Tensor:
    """Packed codes uint8 [B, L, 1, Cb] of tokens [B, ..., C], each normalized, then rotated: all in float32, in the order of `cuda/params.h`, the same bits."""
    return codes_of(rotated(row_normed(pixels(x).float(), norm), rotation), table)


def row_normed(x: Tensor, norm: RowNorm) -> Tensor:
    """`((x - mean) * rstd * gamma + beta) * (1 + scale) + shift` of float32 [B, L, 1, C]."""
    channels = x.shape[-1]
    if not norm.rms:
        x = x - _row_sums(x) / channels
    y = x * (1 / (_row_sums(x * x) / channels + norm.eps).sqrt())
    if norm.gamma is not None:
        y = y * norm.gamma
    if norm.beta is not None:
        y = y + norm.beta
    if norm.scale is not None:
        y = y * (1 + norm.scale.float()[:, None, None])
    return y if norm.shift is None else y + norm.shift.float()[:, None, None]


def _row_sums(x: Tensor) -> Tensor:
    """Sums float32 [..., 1] of the last axis, in the order in which the threads of a token add."""
    lanes = row_lanes(x.shape[-1])
    padded = functional.pad(x, (0, -x.shape[-1] % (lanes * OCTET)))
    own = padded.view(*x.shape[:-1], -1, lanes, OCTET)
    total = own.new_zeros(*x.shape[:-1], lanes)
    for octet in range(own.shape[-3]):
        for channel in range(OCTET):
            total = total + own[..., octet, :, channel]
    total = total.view(*x.shape[:-1], -1, 32)
    while total.shape[-1] > 1:
        low, high = total.chunk(2, dim=-1)
        total = low + high
    warps = total[..., 0].unbind(-1)
    result = warps[0]
    for warp in warps[1:]:
        result = result + warp
    return result[..., None]


def group_stats(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps), float32 [B, groups], of an activation. Summed in float64, so a GPU's last bits may differ."""
    values = pixels(x)
    values = values.reshape(*values.shape[:3], groups, -1).double()
    variance, mean = torch.var_mean(values, dim=(1, 2, 4), correction=0)
    return mean.float(), (variance + eps).rsqrt().float()


def convolve(operands: Operands, shape: ConvShape, dtype: torch.dtype, *, on: object = None) -> Tensor:
    """`(float(sum) * (act_scale[row] * weight_scale) + low up^T + bias + sample_bias) * gate + residual`, each step rounded to float32, then to `dtype`.

    Args:
        operands: Of kind `u4` the sum is of (n - qmin) * w, and qmin * weight_sum is added to it. The residual is [M, K], `low` [M, rank].
        shape: The sizes.
        dtype: float16 or bfloat16.
        on: A GPU's tile and number of splits, which do not change the result.

    Returns:
        [N, P, Q, K], contiguous.
    """
    rows = operands.rows.long()
    total = _sums(operands, shape)
    if operands.kind == "u4":
        total = total.double() + operands.qmin[rows].double()[:, None, None, None] * operands.weight_sum.double()
    y = total.float() * (operands.act_scale[rows][:, None, None, None] * operands.weight_scale)
    if operands.low is not None and operands.up is not None:
        y = y + (operands.low.reshape(-1, operands.up.shape[1]).float() @ operands.up.float().T).view(y.shape)
    if operands.bias is not None:
        y = y + operands.bias
    if operands.sample_bias is not None:
        y = y + operands.sample_bias[:, None, None].float()
    if operands.gate is not None:
        y = y * operands.gate[:, None, None].float()
    if operands.residual is not None:
        y = y + operands.residual.reshape(y.shape).float()
    if operands.saturate:
        y = y.clamp(-65504, 65504)
    return y.to(dtype).contiguous()


def _sums(operands: Operands, shape: ConvShape) -> Tensor:
    """Sums of products of the stored codes [N, P, Q, K], in float32 where each partial sum stays below 2^24 and so is exact, else in float64."""
    kind, bits = operands.kind, bits_of(operands.kind)
    filters = unpack_codes(operands.weight, bits)
    largest_sum = int(filters.to(torch.int32).abs().sum(dim=(1, 2)).max())
    exact = torch.float32 if LARGEST_CODE[kind] * largest_sum < 2**24 else torch.float64
    filters = filters.to(exact)
    codes = _padded(operands.codes, operands.zero[operands.rows.long()], shape.padding)
    x = unpack_codes(codes, bits, unsigned=kind == "u4").to(exact)
    if shape.R == shape.S == 1:
        return x[:, :: shape.stride, :: shape.stride] @ filters[:, 0].T
    filters = filters.view(shape.K, shape.R, shape.S, -1).permute(0, 3, 1, 2)
    return functional.conv2d(x.permute(0, 3, 1, 2), filters, stride=shape.stride).permute(0, 2, 3, 1)


def _padded(codes: Tensor, zero: Tensor, padding: int) -> Tensor:
    """Pad the map by `padding` pixels with the sample's 16-byte code of zero, uint8 [N, 16]: uint8 [N, H + 2p, W + 2p, Cb]."""
    if padding == 0:
        return codes
    batch, height, width, stored = codes.shape
    pixel = zero.repeat(1, stored // zero.shape[1])[:, None, None]
    result = pixel.expand(batch, height + 2 * padding, width + 2 * padding, stored).clone()
    result[:, padding:-padding, padding:-padding] = codes
    return result
