"""Record a rewritten graph on the CPU, for one set of input shapes: every later run calls the kernels one after the other, in memory that stays.

What a CUDA graph is to a GPU. The kernels' operators are recorded by `engines/kernels/cpu/ops.py`, and so are concatenations and upsampling of maps; what
torch computes is called again, and its result copied to where the kernels read it. Views and sizes are known since the recording.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edm_deploy.errors import UnsupportedError
from engines.kernels import ops
from engines.kernels.checks import FLOATS
from engines.kernels.cpu.memory import Memory, storage_of
from engines.kernels.cpu.ops import RecordedOps
from engines.kernels.cpu.weights import Weights
from engines.torch_graph.fx_helpers import aten

kernels: Any = torch.ops.edm_deploy
RECORDED = {
    getattr(kernels, name).default for name in ("quantize", "quantize_normed", "quantize_row_normed", "group_stats", "conv2d", "linear")
}
assert ops.SCHEMAS  # importing the file registers the operators
SIZES = {aten.sym_size.int, aten.sym_stride.int, aten.sym_numel.default}
# Operators that write their result to where it is read, which saves a copy.
WITH_OUTPUT: Mapping[Any, Any] = {aten.cat.default: aten.cat.out, aten.add.Tensor: aten.add.out, aten.mul.Tensor: aten.mul.out}


class RecordedGraph:
    """A graph recorded with the shapes of its first inputs.

    Attributes:
        outputs: Of the first run; each later run overwrites them.

    Args:
        module: The graph, with its tensors on the CPU.
        inputs: In the order of its placeholders. They are copied.
        weights: Shared by the recordings of a session.
        threads: Of the kernels.
        kept: Places of inputs that are read where they are, because they are the same tensors in every run.
    """

    def __init__(
        self, module: fx.GraphModule, inputs: Sequence[Tensor], weights: Weights, threads: int, kept: frozenset[int] = frozenset()
    ):
        self._memory = Memory()
        self._module = module
        self._readers: dict[int, int] = {}  # how many live values lie in each block
        self._inputs = [value if place in kept else _own(value) for place, value in enumerate(inputs)]
        self._copied = [place for place in range(len(inputs)) if place not in kept]
        own = {storage_of(value) for value in (*self._inputs, *module.parameters(), *module.buffers())}
        self._ops = RecordedOps(weights, self._memory, threads, stays=lambda tensor: storage_of(tensor) in own)
        self.outputs = self._record()
        self._replay = self._ops.replayed()

    @property
    def bytes(self) -> int:
        """Memory of values between the layers."""
        return self._memory.total

    def run(self, inputs: Sequence[Tensor]) -> Any:
        """The outputs for inputs of the recorded shapes, in the recording's memory."""
        for place in self._copied:
            self._inputs[place].copy_(inputs[place])
        self._replay()
        return self.outputs

    def _record(self) -> Any:
        values: dict[fx.Node, Any] = {}
        placeholders = iter(self._inputs)
        last = {source: node for node in self._module.graph.nodes for source in node.all_input_nodes}
        ending: dict[fx.Node, list[fx.Node]] = {}
        for source, node in last.items():
            ending.setdefault(node, []).append(source)
        for node in self._module.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(placeholders)
            elif node.op == "get_attr":
                values[node] = operator.attrgetter(str(node.target))(self._module)
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            else:
                values[node] = self._value(node, *fx.map_arg((node.args, node.kwargs), values.__getitem__))
                self._count(values[node], 1)
                for source in (*ending.get(node, ()), *(() if node in last else (node,))):
                    if source.op == "call_function":
                        self._count(values.pop(source), -1)
        raise AssertionError("a graph ends with its output")

    def _count(self, value: Any, change: int) -> None:
        """Count the values in each block; a block that holds none serves later values."""
        for storage in {storage_of(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor) and self._memory.owns(leaf)}:
            self._readers[storage] = self._readers.get(storage, 0) + change
            if self._readers[storage] == 0:
                self._memory.free(storage)

    def _value(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target in RECORDED:
            with ops.implemented_by(self._ops):
                return node.target(*args)  # type: ignore[operator]
        if (value := self._by_kernel(node.target, args, kwargs)) is not None:
            return value
        assert callable(node.target)
        return self._by_torch(node.target, args, kwargs)

    def _by_kernel(self, target: Any, args: Any, kwargs: Any) -> Tensor | None:
        """Concatenations, and nearest upsampling of maps, where the kernels move their memory; else None."""
        if target is aten.cat.default and len({part.dtype for part in args[0]}) == 1 and (order := _common_order(args[0])) is not None:
            axis = order.index(kwargs.get("dim", (*args[1:], 0)[0]) % len(order))
            parts = [part.permute(order) for part in args[0]]
            return self._ops.concatenate(parts, axis).permute(_inverse(order))
        if target is aten.scaled_dot_product_attention.default and _is_plain_attention(*args, **kwargs):
            query, key, value = args[:3]
            return self._ops.attention(query, key, value, kwargs.get("scale"))
        if target is aten.upsample_nearest2d.vec and args[1] is None and args[0].is_contiguous(memory_format=torch.channels_last):
            factors = set(args[2])
            if len(factors) == 1 and (factor := factors.pop()) == int(factor):
                return self._ops.upsample(args[0].permute(0, 2, 3, 1), int(factor)).permute(0, 3, 1, 2)
        return None

    def _by_torch(self, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            return self._in_place(target, args, kwargs)
        result = target(*args, **kwargs)
        _refuse_values(target, args, kwargs, result)
        leaves, form = pytree.tree_flatten(result)
        read = {storage_of(leaf) for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        fresh = [leaf for leaf in leaves if isinstance(leaf, Tensor) and storage_of(leaf) not in read]
        if not fresh:
            return result
        own = {id(leaf): self._memory.empty(leaf.shape, leaf.dtype, _dense(leaf)) for leaf in fresh}
        if isinstance(result, Tensor) and target in WITH_OUTPUT:
            self._ops.step(partial(WITH_OUTPUT[target], *args, **kwargs, out=own[id(result)]))
        else:
            places = [place for place, leaf in enumerate(leaves) if id(leaf) in own]
            targets = [own[id(leaves[place])] for place in places]
            self._ops.step(partial(_again, partial(target, *args, **kwargs), places, targets))
        return pytree.tree_unflatten([own.get(id(leaf), leaf) for leaf in leaves], form)

    def _in_place(self, target: Any, args: Any, kwargs: Any) -> Any:
        """An operator that writes to an argument: each run writes again, to memory that the run has filled before."""
        arguments = target._schema.arguments
        given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
        filled = {storage_of(self._inputs[place]) for place in self._copied}
        for argument in arguments:
            if argument.name not in given or argument.alias_info is None or not argument.alias_info.is_write:
                continue
            if not all(self._memory.owns(tensor) or storage_of(tensor) in filled for tensor in pytree.tree_leaves(given[argument.name])):
                raise UnsupportedError(
                    f"{target} writes to a constant of the model, which the cpu backend does not support. Build for openvino or ort."
                )
        return self._ops.step(partial(target, *args, **kwargs))


def _refuse_values(target: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Raise UnsupportedError where a number was read from a tensor: it would be the recorded one in every later run."""
    numbers = any(leaf is not None and not isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result))
    if numbers and target not in SIZES and any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves((args, kwargs))):
        raise UnsupportedError(
            f"{target} reads a number from a tensor, which the cpu backend does not repeat in later calls. Build for openvino or ort."
        )


def _again(function: Callable[[], Any], places: Sequence[int], targets: Sequence[Tensor]) -> None:
    leaves = pytree.tree_leaves(function())
    for place, target in zip(places, targets, strict=True):
        target.copy_(leaves[place])


def _own(value: Tensor) -> Tensor:
    """A copy, a map's channels last."""
    return value.clone(memory_format=torch.channels_last if value.ndim == 4 else torch.contiguous_format)


def _dense(value: Tensor) -> tuple[int, ...]:
    """The strides of a copy without gaps, its axes in the same order in memory."""
    return tuple(torch.empty_like(value).stride())


def _common_order(parts: Sequence[Tensor]) -> tuple[int, ...] | None:
    """The order of axes in which all parts are contiguous, or None."""
    rank = parts[0].ndim
    orders: list[tuple[int, ...]] = [tuple(range(rank)), *([(0, 2, 3, 1)] if rank == 4 else [])]
    for order in orders:
        if all(part.permute(order).is_contiguous() for part in parts):
            return order
    return None


def _is_plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    """Whether the attention kernel computes these operands: no mask, as many heads and channels everywhere, channels side by side."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa or query.ndim != 4 or query.dtype not in FLOATS:
        return False
    same = all(x.shape[:2] == query.shape[:2] and x.shape[3] == query.shape[3] and x.dtype == query.dtype for x in (key, value))
    return same and all(x.stride(3) == 1 for x in (query, key, value))


def _inverse(order: Sequence[int]) -> list[int]:
    return [order.index(axis) for axis in range(len(order))]
