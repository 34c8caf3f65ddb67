"""Expected time of a whole step on a GPU: every node of a denoiser's graph, at given shapes. Computed from GPU figures and shapes, not measured.

Layers are costed as in `roofline.py`. What is bound by memory, norms, quantizers, activations, additions, copies, moves its inputs and outputs once at the bandwidth
of DRAM, or of L2 where they fit into half of it. Attention is costed as in `attention_time.py`. Each kernel
adds its launch. With `compiled`, operations between the products are fused as torch.compile does: a chain of them reads what comes from outside and
writes what others read. profiles/measured.toml has published times of whole steps, of which no constant was chosen, and how far this model is from them.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from engines.kernels.launch import BRANCH_PIXELS
from engines.performance.attention_time import KEY_KERNELS, attention_s8_seconds, attention_seconds
from engines.performance.gpus import Gpu, launch_seconds
from engines.performance.roofline import MAIN_LOOP, Matmul, Precision, expected, others

Kind = Literal["layers", "attention", "quantize", "norm statistics", "norms", "elementwise"]

STATIC = (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv)
BITS = {"s4": 4, "u4": 4, "s8": 8}
aten: Any = torch.ops.aten
kernels: Any = torch.ops.edm_deploy
FLOAT_LAYERS = (aten.conv2d.default, aten.linear.default)
OURS: dict[str, Kind] = {
    "quantize": "quantize",
    "quantize_normed": "quantize",
    "quantize_row_normed": "quantize",
    "quantize_branch": "quantize",
    "group_stats": "norm statistics",
    "rotary": "elementwise",
}
NORMS = (aten.group_norm.default, aten.layer_norm.default, aten.rms_norm.default)
SDPA = aten.scaled_dot_product_attention.default


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Expected cost of one node, or of several that are one kernel.

    Attributes:
        kind: What it is part of.
        name: Name of its operator, or of the first.
        seconds: Launches included.
        launches: Number of kernels.
    """

    kind: Kind
    name: str
    seconds: float
    launches: int


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Expected time of one call of a graph, part by part."""

    costs: tuple[Cost, ...]

    @property
    def seconds(self) -> float:
        """Seconds of all kernels."""
        return sum(cost.seconds for cost in self.costs)

    @property
    def launches(self) -> int:
        """Number of kernels."""
        return sum(cost.launches for cost in self.costs)

    def by_kind(self) -> dict[Kind, float]:
        """Seconds of each kind, the largest first."""
        total: dict[Kind, float] = {}
        for cost in self.costs:
            total[cost.kind] = total.get(cost.kind, 0.0) + cost.seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))


def step_time(
    module: fx.GraphModule,
    inputs: Sequence[Tensor],
    gpu: Gpu,
    *,
    compiled: bool = False,
    graph: bool = True,
) -> StepTime:
    """Expected time of one call.

    Args:
        module: A denoiser's graph of aten's and our operators, its tensors on the meta device.
        inputs: On the meta device, in the graph's order.
        gpu: The GPU.
        compiled: Whether operations between products are fused as torch.compile does.
        graph: Whether kernels are launched by a CUDA graph.
    """
    recorded = _Recorder(module)
    recorded.run(*inputs)
    model = _Model(gpu, launch_seconds(graph=graph), graph)
    costs = [model.product(node, *recorded.values[node]) for node in recorded.products]
    groups = _fused(recorded) if compiled else [{node} for node in recorded.others]
    costs += [model.moved(group, recorded) for group in groups]
    return StepTime(costs=tuple(costs))


class _Recorder(fx.Interpreter):
    """Runs a graph on the meta device, and keeps the arguments and the result of each node that is a kernel.

    Attributes:
        values: Arguments and result of each operator.
        products, others: Nodes that are kernels: layers and attention, and what is bound by memory. The rest are views and sizes.
        bytes: Of each node's result; what is expanded counts as often as it is stored.
        level: Number of products on the longest way to each node.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)  # type: ignore[no-untyped-call]
        self.values: dict[fx.Node, tuple[tuple[Any, ...], Any]] = {}
        self.products: dict[fx.Node, None] = {}
        self.others: dict[fx.Node, int] = {}  # and their numbers
        self.bytes: dict[fx.Node, int] = {}
        self.level: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        arguments: Any = self.fetch_args_kwargs_from_env(n)[0]
        # FlashAttention's result is [B, L, H, D] in memory; on the meta device torch would decompose it.
        result = _attended(*arguments[:3]) if n.target is SDPA else super().run_node(n)
        self.bytes[n] = _bytes(_tensors(result))
        self.level[n] = max((self.level[source] + (source in self.products) for source in n.all_input_nodes), default=0)
        if n.op != "call_function" or n.target in STATIC or getattr(n.target, "__name__", "") == "item_of" or not _tensors(result):
            return result
        self.values[n] = arguments, result
        if n.target in FLOAT_LAYERS or n.target is SDPA or _ours(n) in ("conv2d", "linear", "attention_s8"):
            self.products[n] = None
        elif not _is_view(arguments, result):
            self.others[n] = len(self.others)
        return result

    def source(self, node: fx.Node) -> fx.Node:
        """The node that computed the memory that `node` is, or is a view of."""
        while node.op == "call_function" and node not in self.others and node not in self.products and node.all_input_nodes:
            node = node.all_input_nodes[0]
        return node


@dataclass(frozen=True)
class _Model:
    gpu: Gpu
    launch: float
    graph: bool

    def product(self, node: fx.Node, arguments: tuple[Any, ...], result: Any) -> Cost:
        name = str(node.target)
        if node.target is SDPA:
            seconds = attention_seconds(arguments[0].shape, arguments[1].shape, self.gpu) + self.launch
            return Cost(kind="attention", name=name, seconds=seconds, launches=1)
        if _ours(node) == "attention_s8":
            launches = KEY_KERNELS + 1
            seconds = attention_s8_seconds(arguments[0].shape, arguments[1].shape, self.gpu) + launches * self.launch
            return Cost(kind="attention", name=name, seconds=seconds, launches=launches)
        if node.target in FLOAT_LAYERS:
            return self._float_layer(name, arguments[0], arguments[1], result)
        schema: Any = node.target
        operands = dict(zip((each.name for each in schema._schema.arguments), arguments, strict=False))
        codes, weight, residual, kind = (operands[name] for name in ("codes", "weight", "residual", "kind"))
        outputs, taps, stored = weight.shape
        matmul = Matmul(
            rows=result.numel() // outputs,
            channels=stored * 8 // BITS[kind],
            taps=taps,
            outputs=outputs,
            inputs=codes.numel() // stored,
        )
        precision: Precision = "int8" if kind == "s8" else "int4"
        found = expected(matmul, precision, self.gpu, graph=self.graph, quantize=False)
        read = 0.0 if residual is None else self._transfer(_bytes([residual]))
        if (low := operands["low"]) is not None:  # its tiles follow the codes' through the same loop
            read += self._transfer(_bytes([low, operands["up"]])) + 2 * low.numel() * outputs / (MAIN_LOOP * self.gpu.peak("float16"))
        return Cost(kind="layers", name=name, seconds=found.seconds + read, launches=2 if found.splits > 1 else 1)

    def _float_layer(self, name: str, x: Tensor, weight: Tensor, y: Tensor) -> Cost:
        outputs, channels, *window = weight.shape
        rows, inputs = y.numel() // outputs, x.numel() // (x.shape[1] if window else x.shape[-1])
        matmul = Matmul(rows=rows, channels=channels, taps=math.prod(window), outputs=outputs, inputs=inputs)
        found = others(matmul, "float16", self.gpu, graph=self.graph)
        return Cost(kind="layers", name=name, seconds=found.seconds, launches=2 if found.splits > 1 else 1)

    def moved(self, nodes: set[fx.Node], recorded: _Recorder) -> Cost:
        """Nodes that are one kernel, bound by memory: it reads what comes from outside, and writes what others read."""
        first = min(nodes, key=recorded.others.__getitem__)
        read = {source for node in nodes for source in node.all_input_nodes if recorded.source(source) not in nodes}
        written = [node for node in nodes if _read_outside(node, nodes, recorded)]
        size = sum(recorded.bytes[node] for node in (*read, *written))
        norms = [node for node in nodes if node.target in NORMS]
        # A group norm's statistics read everything before the first value is written.
        twice = sum(_bytes([recorded.values[node][0][0]]) for node in norms if node.target is aten.group_norm.default)
        ours = _ours(first)
        launches = 2 if twice or ours == "group_stats" else 1
        again = self._read_again(recorded.values[first][0]) if ours == "quantize_branch" else 0.0
        kind: Kind = "norms" if norms else OURS.get(ours, "elementwise")
        return Cost(
            kind=kind, name=str(first.target), seconds=self._transfer(size + twice) + again + launches * self.launch, launches=launches
        )

    def _read_again(self, arguments: tuple[Any, ...]) -> float:
        """Seconds in which every block of 32 tokens reads a branch's first matrix from the L2 cache, and multiplies; a block has a multiprocessor's share of both."""
        x, down = arguments[0], next(each for each in arguments[9:] if isinstance(each, Tensor))
        blocks = x.shape[0] * math.ceil(math.prod(x.shape[1:-1]) / BRANCH_PIXELS)
        products = 2 * BRANCH_PIXELS * down.numel() / (MAIN_LOOP * self.gpu.peak("float16"))
        return float(math.ceil(blocks / self.gpu.sms) * self.gpu.sms * (_bytes([down]) / self.gpu.l2 + products))

    def _transfer(self, size: float) -> float:
        return size / (self.gpu.l2 if size <= self.gpu.l2_size / 2 else self.gpu.dram)


def _fused(recorded: _Recorder) -> list[set[fx.Node]]:
    """Groups of nodes that torch.compile makes one kernel of: neighbours with results of one size, between which is no product and no operator of ours."""
    group_of: dict[fx.Node, set[fx.Node]] = {}
    for node in recorded.others:
        group = group_of[node] = {node}
        for source in node.all_input_nodes:
            producer = recorded.source(source)
            if producer not in group_of or _ours(producer) or _ours(node) or recorded.level[producer] != recorded.level[node]:
                continue
            if recorded.bytes[source] and _size(producer, recorded) == _size(node, recorded):
                group |= group_of[producer]
                group_of |= dict.fromkeys(group_of[producer], group)
    return list({id(group): group for group in group_of.values()}.values())


def _read_outside(node: fx.Node, group: set[fx.Node], recorded: _Recorder) -> bool:
    pending, seen = list(node.users), set[fx.Node]()
    while pending:
        user = pending.pop()
        if user in seen or user in group:
            continue
        seen.add(user)
        if user.op == "output" or user in recorded.others or user in recorded.products:
            return True
        pending += list(user.users)
    return False


def _size(node: fx.Node, recorded: _Recorder) -> int:
    return max(tensor.numel() for tensor in _tensors(recorded.values[node][1]))


def _ours(node: fx.Node) -> str:
    """Name of our operator that a node calls, or an empty string."""
    name = str(node.target)
    return name.removeprefix("edm_deploy.").removesuffix(".default") if name.startswith("edm_deploy.") else ""


def _is_view(arguments: Iterable[Any], result: Any) -> bool:
    own = {tensor.untyped_storage()._cdata for tensor in _tensors(result)}
    return own <= {tensor.untyped_storage()._cdata for tensor in _tensors(arguments)}


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in value for tensor in _tensors(item)] if isinstance(value, list | tuple) else []


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()) for tensor in tensors)


def _attended(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
