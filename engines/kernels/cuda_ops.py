"""Launch the kernels on torch tensors: select the entry point and the tile, allocate outputs. Same functions as `torch_ops.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from edm_deploy.numerics.kernel_layout import CHUNK, code_bytes
from engines.kernels import driver
from engines.kernels.checks import FLOATS
from engines.kernels.launch import (
    FIRST_PROLOGUES,
    OCTET,
    PROLOGUES,
    TYPES,
    ConvParams,
    QuantizeParams,
    RowNormParams,
    StatsParams,
    chunk_of,
    conv_launches,
    quantize_launch,
    row_lanes,
    row_norm_launch,
    stats_launches,
)
from engines.kernels.operands import ConvShape, Norm, Operands, RowNorm, Table
from engines.kernels.tiles import Tile, choose_tile
from engines.kernels.torch_ops import pixels

TYPE_NAMES = dict(zip(FLOATS, TYPES, strict=True))


def quantize(x: Tensor, norm: Norm | None, table: Table, *, activation: str = "none", rotation: int = 0) -> Tensor:
    """As `torch_ops.quantize`. A contiguous map [B, C, H, W] is read without a copy, unless a norm or a GELU precedes, which require channels last."""
    batch, height, width, channels = pixels(x).shape
    channels = channels // 2 if activation == "geglu" else channels
    first = x.ndim == 4 and x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last)
    first = first and PROLOGUES[norm is not None, activation] in FIRST_PROLOGUES
    values = x if first else pixels(x).contiguous()
    codes = torch.empty((batch, height, width, code_bytes(channels, table.bits)), dtype=torch.uint8, device=x.device)
    params = QuantizeParams(
        x=values.data_ptr(),
        codes=codes.data_ptr(),
        mean=_address(norm.mean if norm else None),
        rstd=_address(norm.rstd if norm else None),
        gamma=_address(norm.gamma if norm else None),
        beta=_address(norm.beta if norm else None),
        N=batch,
        HW=height * width,
        C=channels,
        Cb=codes.shape[-1],
        groups=norm.mean.shape[1] if norm else 0,
        rotation=rotation,
        **_of_table(table),
    )
    type_name = TYPE_NAMES[x.dtype]
    call = quantize_launch(
        params, type_name=type_name, bits=table.bits, channels_last=not first, norm=norm is not None, activation=activation
    )
    driver.launch([call], x.device)
    return codes


def quantize_rows(x: Tensor, norm: RowNorm, table: Table, *, rotation: int = 0) -> Tensor:
    """As `torch_ops.quantize_rows`."""
    values = pixels(x).contiguous()
    batch, tokens, _, channels = values.shape
    codes = torch.empty((batch, tokens, 1, code_bytes(channels, table.bits)), dtype=torch.uint8, device=x.device)
    scale, shift = (unit_stride(column) for column in (norm.scale, norm.shift))
    params = RowNormParams(
        x=values.data_ptr(),
        codes=codes.data_ptr(),
        gamma=_address(norm.gamma),
        beta=_address(norm.beta),
        scale=_address(scale),
        shift=_address(shift),
        N=batch,
        HW=tokens,
        C=channels,
        Cb=codes.shape[-1],
        **_of_table(table),
        scale_stride=0 if scale is None else scale.stride(0),
        shift_stride=0 if shift is None else shift.stride(0),
        lanes=row_lanes(channels),
        rms=norm.rms,
        rotation=rotation,
        eps=norm.eps,
    )
    driver.launch([row_norm_launch(params, type_name=TYPE_NAMES[x.dtype], bits=table.bits)], x.device)
    return codes


def group_stats(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """As `torch_ops.group_stats`, summed in float32 about the first pixel of each chunk."""
    values = pixels(x).contiguous()
    batch, height, width, channels = values.shape
    chunk = chunk_of(height * width)
    mean, rstd = (torch.empty((batch, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    partial = torch.empty((batch, -(-height * width // chunk), channels, 2), dtype=torch.float32, device=x.device)
    params = StatsParams(
        x=values.data_ptr(),
        partial=partial.data_ptr(),
        mean=mean.data_ptr(),
        rstd=rstd.data_ptr(),
        N=batch,
        HW=height * width,
        C=channels,
        groups=groups,
        chunk=chunk,
        eps=eps,
    )
    driver.launch(stats_launches(params, type_name=TYPE_NAMES[x.dtype]), x.device)
    return mean, rstd


def convolve(operands: Operands, shape: ConvShape, dtype: torch.dtype, *, on: tuple[Tile, int] | None = None) -> Tensor:
    """As `torch_ops.convolve`; `on` is the tile and the number of splits, which `choose_tile` chooses otherwise."""
    device, M, K = operands.codes.device, shape.M, shape.K
    tile, splits = on or choose_tile(M, K, shape.R * shape.S * shape.Cb, driver.multiprocessors(device))
    out = torch.empty((shape.N, shape.P, shape.Q, K), dtype=dtype, device=device)
    partial = torch.empty((splits, M, K), dtype=torch.int32, device=device) if splits > 1 else None
    # Referenced until the launch: the allocator reuses freed memory, in stream order.
    codes, weight, zero = aligned(operands.codes), aligned(operands.weight), aligned(operands.zero)
    residual = None if operands.residual is None else aligned(operands.residual.reshape(M, K).contiguous())
    low = None if operands.low is None else _rows(operands.low.reshape(M, -1))
    up = None if operands.up is None else aligned(operands.up)
    sample_bias, gate = unit_stride(operands.sample_bias), unit_stride(operands.gate)
    params = ConvParams(
        codes=codes.data_ptr(),
        weight=weight.data_ptr(),
        zero=zero.data_ptr(),
        row=operands.rows.data_ptr(),
        act_scale=operands.act_scale.data_ptr(),
        qmin=operands.qmin.data_ptr(),
        weight_scale=operands.weight_scale.data_ptr(),
        weight_sum=operands.weight_sum.data_ptr(),
        bias=_address(operands.bias),
        sample_bias=_address(sample_bias),
        gate=_address(gate),
        residual=_address(residual),
        low=_address(low),
        up=_address(up),
        rank=0 if up is None else up.shape[1],
        low_stride=0 if low is None else low.stride(0),
        out=out.data_ptr(),
        partial=_address(partial),
        N=shape.N,
        H=shape.H,
        W=shape.W,
        Cb=shape.Cb,
        K=K,
        R=shape.R,
        S=shape.S,
        P=shape.P,
        Q=shape.Q,
        padding=shape.padding,
        stride=shape.stride,
        splits=splits,
        sample_bias_stride=0 if sample_bias is None else sample_bias.stride(0),
        gate_stride=0 if gate is None else gate.stride(0),
        saturate=operands.saturate,
    )
    driver.launch(conv_launches(params, kind=operands.kind, tile=tile, type_name=TYPE_NAMES[dtype]), device)
    return out


def _of_table(table: Table) -> dict[str, int]:
    """What the structs of quantizers have of a table."""
    return {name: column.data_ptr() for name, column in table.columns.items()} | {"unsigned_codes": table.unsigned}


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def unit_stride(columns: Tensor | None) -> Tensor | None:
    """[B, C] with neighbouring channels, as a chunk of a projection has them; else a copy."""
    return columns if columns is None or columns.stride(1) == 1 else columns.contiguous()


def _rows(low: Tensor) -> Tensor:
    """[M, rank] whose rows start at 16 bytes, as a part of the columns of a wider tensor may have them; else a copy."""
    fits = low.stride(1) == 1 and low.stride(0) % OCTET == 0 and low.data_ptr() % CHUNK == 0
    return low if fits else low.clone(memory_format=torch.contiguous_format)


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy where it does not start at 16 bytes, as a view into something larger may not."""
    return tensor if tensor.data_ptr() % CHUNK == 0 else tensor.clone()
