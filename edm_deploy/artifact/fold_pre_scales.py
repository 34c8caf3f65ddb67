"""Fold pre-scales exactly into the parameters of the layers that produce the inputs they multiply.

Source: Xiao et al., SmoothQuant, arXiv 2211.10438, section 4 (scales fused into the layer before).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.node import map_arg

from edm_deploy.artifact.artifact import Artifact
from edm_deploy.network.float_program import MODEL, exported_program
from edm_deploy.network.low_rank_branch import half_values, in_branch
from edm_deploy.network.restructure import PRE_SCALE

_aten = torch.ops.aten
Edits = dict[str, Tensor]  # float32 factors of parameters by name, each of a shape that broadcasts over the parameter

# Elementwise or per channel: scaling a channel of the input scales the same channel of the output.
_KEPT = (_aten.to, _aten._to_copy, _aten.dropout, _aten.contiguous, _aten.clone, _aten.detach, _aten.alias)
_BY_CHANNEL = (_aten.upsample_nearest2d, _aten.avg_pool2d)
# Values are moved or dropped.
_MOVED = (
    _aten.view,
    _aten.reshape,
    _aten._unsafe_view,
    _aten.flatten,
    _aten.unflatten,
    _aten.permute,
    _aten.transpose,
    _aten.unsqueeze,
    _aten.squeeze,
    _aten.expand,
    _aten.slice,
    _aten.select,
)
# Several outputs, each a part of one input.
_SPLIT = (_aten.split, _aten.split_with_sizes, _aten.chunk)


def fold_pre_scales(artifact: Artifact) -> Artifact:
    """The artifact with as few pre-scales as an exact rewrite can leave; its function, codes and tables are unchanged.

    Args:
        artifact: A valid artifact. Where it has no pre-scale, it is returned as it is.
    """
    if not artifact.structure.pre_scaled:
        return artifact
    program = exported_program(artifact.family_object, artifact.config, torch.float32, structure=artifact.structure)
    edits, folded = edits_of(program, {name: artifact.params[f"{name}.{PRE_SCALE}"] for name in artifact.structure.pre_scaled})
    gone = {f"{name}.{PRE_SCALE}" for name in folded}
    params = {name: value for name, value in artifact.params.items() if name not in gone}
    sites = dict(artifact.sites)
    for name, factor in edits.items():
        layer = name.removesuffix(".weight")
        if layer in sites:
            sites[layer] = replace(sites[layer], weight_scale=sites[layer].weight_scale * factor.flatten())
        else:
            params[name] = half_values(params[name] * factor) if in_branch(layer) else params[name] * factor
    absorbed = {f"{name}.input": artifact.params[f"{name}.{PRE_SCALE}"] for name in folded if name in sites}
    outputs = {name.removesuffix(".weight"): factor for name, factor in edits.items() if name.endswith(".weight")}
    absorbed |= {f"{layer}.output": factor.flatten() for layer, factor in outputs.items() if layer in sites}
    left = tuple(name for name in artifact.structure.pre_scaled if name not in folded)
    structure = replace(artifact.structure, pre_scaled=left)
    return replace(artifact, params=params, sites=sites, structure=structure, absorbed=absorbed)


def edits_of(program: ExportedProgram, pre_scales: Mapping[str, Tensor]) -> tuple[Edits, set[str]]:
    """Factors of parameters that replace pre-scales, and the layers whose pre-scales they replace.

    A pre-scale is folded where every operation between its input and a norm's affine parameters or a layer's weight and bias preserves channels, and
    where no other node reads these values; those of q, k and v are folded together where the three are equal. The weight of a branch on the same input,
    which is not scaled, is divided by the pre-scale instead. A pre-scale remains after an activation function,
    after a sum with a value that other nodes read, and after the `1 + scale` of an adaptive norm: p (1 + s) = 1 + (p s + p - 1), whose last sum cancels
    digits where p is small.

    Args:
        program: A float program whose parameters are named `model.*`, with a Mul for each pre-scale.
        pre_scales: float32 [Cin] by layer.
    """
    graph, edits, folded = _Graph(program), Edits(), set[str]()
    for x, layers in graph.muls(pre_scales).items():
        scale, *others = (pre_scales[name] for name in layers.values())
        if all(torch.equal(other, scale) for other in others):
            branches = graph.branches(x)
            found = graph.edits(x, _beside(x, next(iter(layers)), scale), [*layers, *branches])
            if found is not None:
                inverse = {name: (1 / scale).reshape(1, -1, *[1] * (rank - 2)) for name, rank in branches.values()}
                edits = _both(edits, found | inverse)
                folded |= set(layers.values())
    return edits, folded


class _Graph:
    """A float program, traversed from outputs to inputs.

    Attributes:
        parameters: Names of the placeholders that are parameters.
    """

    def __init__(self, program: ExportedProgram) -> None:
        nodes = {node.name: node for node in program.graph.nodes}
        named = program.graph_signature.inputs_to_parameters
        self.parameters = {nodes[placeholder]: name.removeprefix(MODEL) for placeholder, name in named.items()}
        self.rules = self._rules()

    def muls(self, layers: Iterable[str]) -> dict[Node, dict[Node, str]]:
        """For each value that is pre-scaled, its Mul nodes and the layers that follow them."""
        by_name = {name: node for node, name in self.parameters.items()}
        muls: dict[Node, dict[Node, str]] = {}
        for layer in layers:
            scale = by_name[f"{layer}.{PRE_SCALE}"]
            readers = _readers(scale)
            while len(readers) == 1 and readers[0].target != _aten.mul.Tensor:  # cast and reshaped for the input
                scale, readers = readers[0], _readers(readers[0])
            if len(readers) == 1:  # a layer that is used twice has two Muls
                x = next(operand for operand in readers[0].all_input_nodes if operand is not scale)
                muls.setdefault(x, {})[readers[0]] = layer
        return muls

    def branches(self, x: Node) -> dict[Node, tuple[str, int]]:
        """The first layers of branches that read a value: name and rank of their weights, by node."""
        weights = {reader: reader.args[1] for reader in _readers(x) if reader.target in (_aten.linear.default, _aten.conv2d.default)}
        named = {
            reader: (self.parameters.get(weight, ""), len(_shape(weight))) for reader, weight in weights.items() if isinstance(weight, Node)
        }
        return {reader: entry for reader, entry in named.items() if in_branch(entry[0].removesuffix(".weight"))}

    def edits(self, node: Node, factor: Tensor, readers: Iterable[Node]) -> Edits | None:
        """Factors of parameters that multiply `node` by `factor`, which has its rank and broadcasts over it; None where no exact ones exist.

        Args:
            node: A value of the graph.
            factor: float32, 1 where a dimension is not scaled.
            readers: All that may read the value.
        """
        if set(_readers(node)) != set(readers) or any(
            size not in (1, _size(axis)) for size, axis in zip(factor.shape, _shape(node), strict=True)
        ):
            return None
        if node in self.parameters:
            return {self.parameters[node]: factor}
        rule = self.rules.get(getattr(node.target, "overloadpacket", node.target))
        return rule(node, factor) if rule else None

    def _rules(self) -> dict[Any, Callable[[Node, Tensor], Edits | None]]:
        rules: dict[Any, Callable[[Node, Tensor], Edits | None]] = {
            _aten.linear: lambda node, factor: self._of_rows(node, factor, -1, node.args[1:3]),
            _aten.conv2d: lambda node, factor: self._of_rows(node, factor, 1, node.args[1:3]),
            _aten.layer_norm: self._of_layer_norm,
            _aten.group_norm: lambda node, factor: self._of_rows(node, factor, 1, node.args[2:4]),
            _aten.mul: self._of_product,
            _aten.div: lambda node, factor: self._of_operand(node, 0, factor) if not node.kwargs else None,  # a rounding mode
            _aten.add: self._of_sum,
            _aten.sub: self._of_sum,
            _aten.cat: self._of_concatenation,
            _aten.scaled_dot_product_attention: self._of_attention,
            operator.getitem: self._of_piece,
        }
        kept = dict.fromkeys(_KEPT, self._of_kept) | dict.fromkeys(_BY_CHANNEL, self._of_channels)
        return rules | kept | dict.fromkeys(_MOVED, self._of_moved)

    def _of_kept(self, node: Node, factor: Tensor) -> Edits | None:
        return self._of_operand(node, 0, factor)

    def _of_channels(self, node: Node, factor: Tensor) -> Edits | None:
        return self._of_operand(node, 0, factor) if _only_along(factor, 1) else None

    def _of_rows(self, node: Node, factor: Tensor, axis: int, weight_and_bias: Sequence[Any]) -> Edits | None:
        """A layer or norm whose output has its channels along `axis` and whose parameters have them along axis 0."""
        held = [operand for operand in weight_and_bias if operand is not None]
        if not held or held[0] is not weight_and_bias[0] or not _only_along(factor, axis):
            return None  # a norm without affine parameters, or a scale that is not per channel
        if any(operand not in self.parameters or _readers(operand) != [node] for operand in held):
            return None  # computed weights, or weights that are used twice
        return {self.parameters[operand]: factor.reshape(-1, *[1] * (len(_shape(operand)) - 1)) for operand in held}

    def _of_layer_norm(self, node: Node, factor: Tensor) -> Edits | None:
        normalized: Sequence[Any] = node.args[1]  # type: ignore[assignment]  # a shape
        return self._of_rows(node, factor, -1, node.args[2:4]) if len(normalized) == 1 else None

    def _of_product(self, node: Node, factor: Tensor) -> Edits | None:
        return next((edits for index in (0, 1) if (edits := self._of_operand(node, index, factor)) is not None), None)

    def _of_sum(self, node: Node, factor: Tensor) -> Edits | None:
        return _all(self._of_operand(node, index, factor) for index in (0, 1))

    def _of_concatenation(self, node: Node, factor: Tensor) -> Edits | None:
        parts: Sequence[Node] = node.args[0]  # type: ignore[assignment]  # what cat takes
        if len(set(parts)) < len(parts):
            return None
        axis: int = node.args[1] if len(node.args) > 1 else 0  # type: ignore[assignment]
        if factor.shape[axis] == 1:
            return _all(self.edits(part, factor, [node]) for part in parts)
        pieces = torch.split(factor, [_size(_shape(part)[axis]) for part in parts], dim=axis)
        return _all(self.edits(part, piece, [node]) for part, piece in zip(parts, pieces, strict=True))

    def _of_attention(self, node: Node, factor: Tensor) -> Edits | None:
        """Attention is linear in its values: scaling a channel of the values scales that channel of the output."""
        return self._of_operand(node, 2, factor) if factor.shape[-2] == 1 else None

    def _of_piece(self, node: Node, factor: Tensor) -> Edits | None:
        split = node.args[0]
        if not isinstance(split, Node) or getattr(split.target, "overloadpacket", None) not in _SPLIT or not _once(split, node):
            return None
        return self._of_moved(split, factor, piece=node)

    def _of_moved(self, node: Node, factor: Tensor, piece: Node | None = None) -> Edits | None:
        """Moved values: each is scaled at its origin; dropped values are unchanged."""
        source = node.args[0]
        assert isinstance(source, Node)  # what moves takes a tensor
        shape = [_size(axis) for axis in _shape(source)]
        index = torch.arange(torch.Size(shape).numel()).reshape(shape)
        came_from = node.target(index, *map_arg(node.args[1:], _number), **map_arg(node.kwargs, _number))  # type: ignore[operator]  # an operator
        came_from = came_from if piece is None else came_from[piece.args[1]]
        wanted = factor.expand(came_from.shape)
        before = torch.ones(index.numel())
        before[came_from.flatten()] = wanted.flatten()
        if not torch.equal(before[came_from], wanted):
            return None  # one value that is read twice would need two scales
        return self.edits(source, _narrowed(before.reshape(shape)), [node])

    def _of_operand(self, node: Node, index: int, factor: Tensor) -> Edits | None:
        """By scaling one operand, which may broadcast, but not along the scaled axis."""
        operand = node.args[index]
        if not isinstance(operand, Node) or sum(other is operand for other in node.args) != 1:
            return None  # a number, or a square, which would be scaled twice
        missing = factor.ndim - len(_shape(operand))
        return self.edits(operand, factor.squeeze(tuple(range(missing))), [node]) if factor.shape[:missing].numel() == 1 else None


def _all(found: Iterable[Edits | None]) -> Edits | None:
    """The union of factors, or None where one is None."""
    total = Edits()
    for edits in found:
        if edits is None:
            return None
        total = _both(total, edits)
    return total


def _both(some: Edits, others: Edits) -> Edits:
    """Factors of one parameter may have two origins: they are combined by multiplication."""
    return some | {name: factor * some[name] if name in some else factor for name, factor in others.items()}


def _readers(node: Node) -> list[Node]:
    """Nodes that read a value, without those that read only its shape or dtype."""
    return [user for user in node.users if user.target not in (_aten._assert_tensor_metadata.default, _aten.sym_size.int)]


def _once(split: Node, piece: Node) -> bool:
    """Whether no other node reads this part of a split value."""
    return not any(user.args[1] == piece.args[1] for user in split.users if user is not piece)


def _shape(node: Node) -> torch.Size:
    shape: torch.Size = node.meta["val"].shape
    return shape


def _size(axis: int | torch.SymInt) -> int:
    """A size as a number: the traced one where it is dynamic."""
    return axis if isinstance(axis, int) else int(axis.node.hint)


def _number(node: Node) -> int:
    return _size(node.meta["val"])


def _beside(x: Node, mul: Node, scale: Tensor) -> Tensor:
    """A pre-scale [Cin] reshaped to the rank of the value that it multiplies."""
    shaped = next(operand for operand in mul.all_input_nodes if operand is not x)
    shape = [_size(axis) for axis in _shape(shaped)]
    return scale.reshape([1] * (len(_shape(x)) - len(shape)) + shape)


def _only_along(factor: Tensor, axis: int) -> bool:
    return factor.numel() == factor.shape[axis]


def _narrowed(factor: Tensor) -> Tensor:
    """A factor with size 1 along every dimension in which it is constant."""
    for axis in range(factor.ndim):
        first = factor.narrow(axis, 0, 1)
        factor = first if torch.equal(factor, first.expand_as(factor)) else factor
    return factor
