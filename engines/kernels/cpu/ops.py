"""The operators by the kernels in C++: each call is recorded, and runs at once too, so that a recording is its first run.

Same functions as `engines/kernels/torch_ops.py`, on codes of 8 bits.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from edm_deploy.errors import UnsupportedError
from edm_deploy.native.cpp import TARGET
from edm_deploy.numerics.kernel_layout import code_bytes
from engines.kernels.cpu.build import instructions, library
from engines.kernels.cpu.launch import ACTIVATIONS, KERNELS, PARAMS, STATS_CHUNK, TYPES, Call
from engines.kernels.cpu.memory import Memory, storage_of
from engines.kernels.cpu.weights import Weights
from engines.kernels.operands import ConvShape, Norm, Operands, RowNorm, Table
from engines.kernels.torch_ops import pixels

Step = tuple[int, ctypes.Structure] | Callable[[], object]  # place of a kernel and its params, or anything else


class RecordedOps:
    """Runs the operators and appends their calls to a list.

    Attributes:
        memory: Where outputs lie.
        steps: In the order of execution.
        threads: Of each kernel.
        stays: Whether a tensor, not of `memory`, is the same in every run: an input or a parameter of the graph. None checks nothing.
    """

    def __init__(
        self, weights: Weights, memory: Memory, threads: int, target: str = TARGET, stays: Callable[[Tensor], bool] | None = None
    ) -> None:
        self.memory, self.threads = memory, threads
        self.steps: list[Step] = []
        self._weights = weights
        self._library = library(target)
        self._tiles = instructions(target) == "AMX"
        self.stays = stays
        self._held: list[Tensor] = []
        self._copies: list[Tensor] = []

    def quantize(self, x: Tensor, norm: Norm | None, table: Table, *, activation: str = "none", rotation: int = 0) -> Tensor:
        """As `torch_ops.quantize`. SiLU and GELU by tanh have a relative error below 2^-20: a code may differ by a tie."""
        values = self._pixels(x)
        batch, height, width, channels = values.shape
        channels = channels // 2 if activation == "geglu" else channels
        codes = self._codes((batch, height, width), channels, table)
        statistics = {} if norm is None else {"mean": norm.mean, "rstd": norm.rstd, "gamma": norm.gamma, "beta": norm.beta}
        self._call(
            "quantize",
            {"x": values, "codes": codes, **table.columns, **statistics},
            N=batch,
            HW=height * width,
            C=channels,
            Cb=codes.shape[-1],
            groups=0 if norm is None else norm.mean.shape[1],
            activation=ACTIVATIONS[activation],
            rotation=rotation,
            type=TYPES[x.dtype],
        )
        return codes

    def quantize_rows(self, x: Tensor, norm: RowNorm, table: Table, *, rotation: int = 0) -> Tensor:
        """As `torch_ops.quantize_rows`, summed in another order."""
        values = self._pixels(x)
        batch, tokens, _, channels = values.shape
        codes = self._codes((batch, tokens, 1), channels, table)
        scale, shift = (self._unit_stride(column) for column in (norm.scale, norm.shift))
        self._call(
            "quantize_rows",
            {"x": values, "codes": codes, **table.columns, "gamma": norm.gamma, "beta": norm.beta, "scale": scale, "shift": shift},
            eps=norm.eps,
            N=batch,
            HW=tokens,
            C=channels,
            Cb=codes.shape[-1],
            scale_stride=0 if scale is None else scale.stride(0),
            shift_stride=0 if shift is None else shift.stride(0),
            rms=norm.rms,
            rotation=rotation,
            type=TYPES[x.dtype],
        )
        return codes

    def group_stats(self, x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
        """As `torch_ops.group_stats`, summed in float32 by STATS_CHUNK pixels."""
        values = self._pixels(x)
        batch, height, width, channels = values.shape
        chunks = -(-height * width // STATS_CHUNK)
        mean, rstd = (self.memory.empty((batch, groups), torch.float32) for _ in range(2))
        partial = self.memory.empty((batch, chunks, 2, channels), torch.float32)
        tensors = {"x": values, "partial": partial, "mean": mean, "rstd": rstd}
        self._call("group_stats", tensors, eps=eps, N=batch, HW=height * width, C=channels, groups=groups, type=TYPES[x.dtype])
        self.memory.free(storage_of(partial))
        return mean, rstd

    def convolve(self, operands: Operands, shape: ConvShape, dtype: torch.dtype, *, on: object = None) -> Tensor:
        """As `torch_ops.convolve`, the same bits.

        Raises:
            UnsupportedError: The codes are not of kind `s8`, or a branch is given by its matrices.
        """
        if operands.kind != "s8":
            raise UnsupportedError(f"The kernels for the CPU multiply codes of kind s8, not {operands.kind}.")
        if operands.low is not None:
            raise UnsupportedError("The kernels for the CPU add a branch as the residual, not by its two matrices.")
        narrow = (shape.R, shape.S, shape.stride) == (
            3,
            3,
            1,
        ) and not self._tiles  # AMX computes 36 products in less time than others 16
        bounds = self.memory.bounds.get(operands.codes.data_ptr()) if narrow else None
        arranged = self._weights.of(operands.weight, bounds, self._library.edm_vectors())
        out = self.memory.empty((shape.N, shape.P, shape.Q, shape.K), dtype)
        columns = {name: getattr(operands, name) for name in ("act_scale", "weight_scale", "bias")}
        per_sample = {name: self._unit_stride(getattr(operands, name)) for name in ("sample_bias", "gate")}
        residual = None if operands.residual is None else self._contiguous(operands.residual)
        tensors = {
            "codes": operands.codes,
            "weight": arranged.weight,
            "start": arranged.start,
            "zero": self._weights.zero(shape.Cb),
            "row": operands.rows,
            "residual": residual,
        }
        strides = {f"{name}_stride": 0 if value is None else value.stride(0) for name, value in per_sample.items()}
        sizes = {name: getattr(shape, name) for name in ("N", "H", "W", "Cb", "K", "R", "S", "P", "Q", "padding", "stride")}
        self._call(
            "winograd" if arranged.transformed else "convolve",
            {**tensors, **columns, **per_sample, "out": out},
            **sizes,
            **strides,
            saturate=operands.saturate,
            type=TYPES[dtype],
        )
        return out

    def attention(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """softmax(query key^T * scale) value in float32, [B, H, L, D], of which neighbouring channels lie side by side; a view of [B, L, H, D]."""
        batch, heads, queries, channels = query.shape
        out = self.memory.empty((batch, queries, heads, channels), query.dtype)
        strides = {f"{name}_stride": tuple(x.stride()[:3]) for name, x in (("query", query), ("key", key), ("value", value))}
        self._call(
            "attention",
            {"query": query, "key": key, "value": value, "out": out},
            **strides,
            scale=channels**-0.5 if scale is None else scale,
            N=batch,
            heads=heads,
            queries=queries,
            keys=key.shape[2],
            D=channels,
            type=TYPES[query.dtype],
        )
        return out.transpose(1, 2)

    def concatenate(self, parts: list[Tensor], axis: int) -> Tensor:
        """The parts, each contiguous, along an axis."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        out = self.memory.empty(shape, parts[0].dtype)
        row, at = math.prod(shape[axis:]) * out.element_size(), 0  # not by strides, which are arbitrary where an axis has one element
        for part in (part for part in parts if part.numel()):
            size = math.prod(part.shape[axis:]) * part.element_size()
            self._call(
                "copy",
                {"source": part, "target": out.view(-1).view(torch.uint8)[at:]},
                rows=part.nbytes // size,
                bytes=size,
                source_stride=size,
                target_stride=row,
            )
            at += size
        return out

    def upsample(self, x: Tensor, factor: int) -> Tensor:
        """Each pixel of a contiguous [B, H, W, C] repeated along both axes."""
        batch, height, width, channels = x.shape
        out = self.memory.empty((batch, factor * height, factor * width, channels), x.dtype)
        self._call("upsample", {"source": x, "target": out}, N=batch, H=height, W=width, bytes=channels * x.element_size(), factor=factor)
        return out

    def step(self, function: Callable[[], Any]) -> Any:
        """Run a function now and record it; it writes to memory of this recording. Returns its result."""
        self.steps.append(function)
        return function()

    def replayed(self) -> Callable[[], None]:
        """A function that runs all steps again. Kernels that follow each other run in one call."""
        runs: list[Callable[[], object]] = []
        for native, group in itertools.groupby(self.steps, lambda step: isinstance(step, tuple)):
            steps = list(group)
            runs.extend([self._together(steps)] if native else steps)  # type: ignore[arg-type]

        def replay() -> None:
            for run in runs:
                run()

        return replay

    def _together(self, steps: list[tuple[int, ctypes.Structure]]) -> Callable[[], object]:
        calls = (Call * len(steps))(*(Call(place, ctypes.addressof(params)) for place, params in steps))
        run, count, threads = self._library.edm_run, len(steps), self.threads
        return lambda: run(calls, count, threads)

    def _codes(self, leading: tuple[int, ...], channels: int, table: Table) -> Tensor:
        if table.bits != 8:
            raise UnsupportedError(f"The kernels for the CPU store codes of 8 bits, not {table.bits}.")
        codes = self.memory.empty((*leading, code_bytes(channels, 8)), torch.uint8)
        self.memory.bounds[codes.data_ptr()] = (int(table.qmin.min()), int(table.qmax.max()))
        return codes

    def _pixels(self, x: Tensor) -> Tensor:
        """As `torch_ops.pixels`, contiguous; a copy is a step of its own."""
        return self._contiguous(pixels(x)) if x.ndim == 4 else pixels(self._contiguous(x))

    def _contiguous(self, x: Tensor) -> Tensor:
        """`x`, or a copy of it that the next kernel reads."""
        if x.is_contiguous():
            return x
        copy = self.memory.empty(x.shape, x.dtype)
        self.step(partial(copy.copy_, x))
        self._copies.append(copy)
        return copy

    def _unit_stride(self, columns: Tensor | None) -> Tensor | None:
        """[B, C] with neighbouring channels, as a chunk of a projection has them; else a copy."""
        return columns if columns is None or columns.stride(1) == 1 else self._contiguous(columns)

    def _call(self, kernel: str, tensors: Mapping[str, Tensor | None], **numbers: Any) -> None:
        addresses = {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
        params = PARAMS[kernel](**addresses, **numbers)
        self._check_memory(kernel, tensors)
        self._held.extend(tensor for tensor in tensors.values() if tensor is not None)
        place = KERNELS.index(kernel)
        self.steps.append((place, params))
        self._library.edm_run(ctypes.byref(Call(place, ctypes.addressof(params))), 1, self.threads)
        while self._copies:
            self.memory.free(storage_of(self._copies.pop()))

    def _check_memory(self, kernel: str, tensors: Mapping[str, Tensor | None]) -> None:
        """A kernel must not read what a later run does not write again: the result of an operator that was not recorded."""
        if self.stays is None:
            return
        for name, tensor in tensors.items():
            stays = tensor is None or self.memory.owns(tensor) or self.stays(tensor) or self._weights.holds(tensor)
            assert stays, f"{kernel} was given {name} in memory that the recording does not own"
