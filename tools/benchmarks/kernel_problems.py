"""Random operands of one layer on a GPU: calls of our operators and of torch's, a check of the results, and timing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from edm_deploy.errors import UnsupportedError
from edm_deploy.numerics.kernel_layout import bits_of, pack_weight, weight_sum, zero_codes
from edm_deploy_tools.benchmarks.layer_shapes import Layer
from engines.kernels import ops

OPS = torch.ops.edm_deploy
assert ops.SCHEMAS  # the import defines the operators
Call = Callable[[], object]

CALLS = 20  # of an operator in one CUDA graph, at least
COPY_BYTES = 1 << 30  # copied to measure the bandwidth
TABLE_ROWS = 20
BOUNDS = {"s8": (-128, 127), "s4": (-8, 7), "u4": (-3, 12)}  # of activation codes, by code format


class Problem:
    """Random operands of one layer on a device, and the operators' calls on them.

    Args:
        layer, batch: Sizes of the problem.
        kind: Code format of the activations, `s8`, `s4` or `u4`.
        device: Device of the operands.
    """

    def __init__(self, layer: Layer, batch: int, kind: str, device: torch.device) -> None:
        low, high = BOUNDS[kind]
        self.layer, self.bits, limit = layer, bits_of(kind), 127 if kind == "s8" else 7
        shape = (batch, layer.H, layer.C) if layer.op == "linear" else (batch, layer.C, layer.H, layer.W)
        self.x = torch.randn(shape, device=device).half()
        if layer.op == "conv":
            self.x = self.x.to(memory_format=torch.channels_last)
        weight = torch.randint(-limit, limit + 1, (layer.K, layer.C, layer.R, layer.R), dtype=torch.int8, device=device)
        qmin, qmax = (torch.full((TABLE_ROWS,), bound, dtype=torch.int32, device=device) for bound in (low, high))
        scale = torch.linspace(3.0, 4.0, TABLE_ROWS, device=device) / high
        rows = torch.arange(batch, dtype=torch.int32, device=device) % TABLE_ROWS
        unsigned = kind == "u4"
        self.table = (rows, 1 / scale, qmin, qmax, self.bits, unsigned, "none", 0)
        self.codes: Tensor = OPS.quantize(self.x, *self.table)
        columns = (torch.rand(layer.K, device=device) * 1e-3, weight_sum(weight), torch.randn(layer.K, device=device))
        epilogue = (None, None, None, None, None, False)  # sample_bias, gate, residual, low, up, saturate
        self.operands = (
            rows,
            pack_weight(weight, self.bits),
            zero_codes(qmin, self.bits, unsigned=unsigned),
            scale,
            qmin,
            *columns,
            *epilogue,
            kind,
        )

    @property
    def sum_bytes(self) -> int:
        """Bytes of codes and weight."""
        return self.codes.numel() + self.operands[1].numel()

    @property
    def quantize_bytes(self) -> int:
        """Bytes that quantization reads and writes."""
        return self.x.numel() * self.x.element_size() + self.codes.numel()

    def quantize(self) -> Tensor:
        """Quantize x to codes."""
        codes: Tensor = OPS.quantize(self.x, *self.table)
        return codes

    def sum(self) -> Tensor:
        """Output of the layer for the codes."""
        return self._sum(self.codes, self.operands)

    def check(self, what: str) -> None:
        """Compare codes and output of the last sample with the CPU's, bit for bit; UnsupportedError if they differ."""
        rows, *table = (_last(value, column == 0) for column, value in enumerate(self.table))
        operands = tuple(_last(value, column == 0) for column, value in enumerate(self.operands))
        codes = OPS.quantize(self.x[-1:].cpu(), rows, *table)
        for actual, expected in ((self.codes, codes), (self.sum(), self._sum(codes, operands))):
            wrong = int((_bits(actual[-1:].cpu()) != _bits(expected)).sum())
            if wrong:
                raise UnsupportedError(f"{what}: {wrong} of {expected.numel()} values differ from the CPU's arithmetic. Nothing was timed.")

    def _sum(self, codes: Tensor, operands: Sequence[Any]) -> Tensor:
        layer = self.layer
        output: Tensor
        if layer.op == "linear":
            output = OPS.linear(codes, *operands, [codes.shape[0], layer.H], torch.float16)
        else:
            output = OPS.conv2d(codes, *operands, [layer.R, layer.R], layer.stride, layer.R // 2, torch.float16)
        return output


def _last(value: Any, per_sample: bool) -> Any:
    return value[-1:].cpu() if per_sample else value.cpu() if isinstance(value, Tensor) else value


def _bits(values: Tensor) -> Tensor:
    return values if values.dtype == torch.uint8 else values.view(torch.int16)


def float_call(layer: Layer, batch: int, device: torch.device) -> Call:
    """A call of torch's float16 convolution or matmul for a layer."""
    bias = torch.randn(layer.K, device=device).half()
    if layer.op == "linear":
        x, weight = torch.randn(batch, layer.H, layer.C, device=device).half(), torch.randn(layer.K, layer.C, device=device).half()
        return lambda: functional.linear(x, weight, bias)
    x, weight = (
        torch.randn(shape, device=device).half().to(memory_format=torch.channels_last)
        for shape in ((batch, layer.C, layer.H, layer.W), (layer.K, layer.C, layer.R, layer.R))
    )
    return lambda: functional.conv2d(x, weight, bias, layer.stride, layer.R // 2)


def fits_int_mm(layer: Layer, batch: int) -> bool:
    """Whether `torch._int_mm` supports the sizes of a layer: a matmul with more than 16 rows, the other sizes multiples of 8."""
    return layer.R == layer.stride == 1 and batch * layer.H * layer.W > 16 and layer.C % 8 == layer.K % 8 == 0


def int_mm_call(layer: Layer, batch: int, device: torch.device) -> Call:
    """A call of `torch._int_mm` for a layer that `fits_int_mm`."""
    rows = batch * layer.H * layer.W
    x, weight = (torch.randint(-127, 128, shape, dtype=torch.int8, device=device) for shape in ((rows, layer.C), (layer.K, layer.C)))
    return lambda: torch._int_mm(x, weight.T)


def graph_seconds(calls: Sequence[Call], replays: int) -> float:
    """Median seconds of one call, over replays of a CUDA graph that makes the calls cyclically, CALLS times at least."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # untyped in torch
    with torch.cuda.stream(stream):
        for call in calls[:3]:  # loads kernels and lets cuDNN choose algorithms, which is not possible during capture
            call()
    torch.cuda.synchronize()
    count = len(calls) * math.ceil(CALLS / len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        for index in range(count):
            calls[index % len(calls)]()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * replays)]  # type: ignore[no-untyped-call]
    for _ in range(3):
        graph.replay()
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    milliseconds = [float(start.elapsed_time(end)) for start, end in zip(events[::2], events[1::2], strict=True)]
    return statistics.median(milliseconds) / 1e3 / count


def copy_bandwidth(device: torch.device, replays: int) -> float:
    """Bandwidth of a copy far larger than L2, in bytes per second read and written."""
    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / graph_seconds([lambda: target.copy_(source)], replays)
