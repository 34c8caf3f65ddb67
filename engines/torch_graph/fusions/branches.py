"""Low-rank branches beside quantized layers: `y = layer(x) + (x down^T) up^T`, of an artifact or of a LoRA, in the kernels of the layer.

    linear(x, down) -> linear(., up) -> add      the second product in the layer's epilogue
    quantize(x), linear(x, down)                 the first product while x is quantized

Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from edm_deploy.network.adapter_inputs import linear_low
from edm_deploy.network.rotation import rotate_weight
from engines.kernels.launch import OCTET
from engines.kernels.quantize_branch import LARGEST_RANK
from engines.torch_graph.fusions.epilogues import PLACES, accepts, same_summands, with_operand
from engines.torch_graph.fusions.hadamard import rotation_of
from engines.torch_graph.fusions.prologues import QUANTIZE, QUANTIZE_BRANCH, item_of, replace_codes
from engines.torch_graph.fx_helpers import aten, calls, value_of
from engines.torch_graph.rewrite import GraphRewrite, kernels

LINEAR, CONV2D = aten.linear.default, aten.conv2d.default
NO_NORM = (None,) * 6  # mean, rstd, gamma, beta, scale, shift


def fuse_up(rewritten: GraphRewrite) -> None:
    """Move the second product of a branch into the epilogue of the layer that it is added to, where nothing else reads it.

    Ranks are filled up to a multiple of eight where the branch's weights are the artifact's. The ranks of two branches are concatenated.
    """
    for add in calls(rewritten.graph, aten.add.Tensor):
        for product, other in (add.args[:2], add.args[1::-1]):
            if add.kwargs or not accepts(product, "sample_bias") or not same_summands(rewritten, product, other):
                continue
            if (branch := _branch_of(rewritten, other)) is None:
                continue
            with rewritten.graph.inserting_before(add):
                low, up = _with_those_of(rewritten, product, *branch)
                first = with_operand(rewritten, product, "low", low)
                fused = with_operand(rewritten, first, "up", up)
            fused.meta = dict(add.meta)
            rewritten.products |= {name: fused for name, node in rewritten.products.items() if node is add}
            add.replace_all_uses_with(fused)
            for node in (add, first, product):
                rewritten.graph.erase_node(node)
            break
    rewritten.graph.eliminate_dead_code()


def _branch_of(rewritten: GraphRewrite, node: Any) -> tuple[Any, Any] | None:
    """(low, up) of a node that multiplies `low` by the matrix `up` [K, rank], the rank a multiple of eight."""
    if not isinstance(node, fx.Node) or node.target not in (LINEAR, CONV2D) or len(node.users) != 1:
        return None
    operands: tuple[Any, ...] = node.args
    low, weight, *others = operands
    if any(each is not None for each in others[:1]):  # a bias
        return None
    if node.target is CONV2D and (tuple(value_of(weight).shape[2:]) != (1, 1) or not all(_is_usual(others))):
        return None
    rank = value_of(weight).shape[1]
    if rank > LARGEST_RANK or (rank % OCTET and not _fill_up(rewritten, low, weight, -rank % OCTET)):
        return None
    if value_of(weight).ndim == 2:
        return low, weight
    with rewritten.graph.inserting_before(node):
        matrix = rewritten.graph.call_function(aten.flatten.using_ints, (weight, 1))
    matrix.meta["val"] = value_of(weight).flatten(1)
    return low, matrix


def _is_usual(arguments: Sequence[Any]) -> Iterator[bool]:
    """Whether each of a convolution's arguments behind its weight, which may be left out, is that of a product: no stride, padding, dilation or groups."""
    for numbers, usual in zip(arguments[1:], (1, 0, 1, 1), strict=False):
        yield all(each == usual for each in (numbers if isinstance(numbers, list | tuple) else [numbers]))


def _fill_up(rewritten: GraphRewrite, low: Any, up: Any, missing: int) -> bool:
    """Add ranks of zeros to both weights of a branch, where they are parameters that nothing else reads."""
    down: Any = low.args[1] if isinstance(low, fx.Node) and low.target in (LINEAR, CONV2D) else None
    if not all(isinstance(each, fx.Node) and str(each.target) in rewritten.tensors and len(each.users) == 1 for each in (down, up)):
        return False
    if len(low.users) != 1 or (len(low.args) > 2 and low.args[2] is not None) or (len(low.args) > 6 and low.args[6] != 1):
        return False  # something else reads it, a bias, groups
    for weight, axis in ((down, 0), (up, 1)):
        name, after = str(weight.target), [0] * (2 * (value_of(weight).ndim - 1 - axis))
        rewritten.tensors[name] = functional.pad(rewritten.tensors[name], (*after, 0, missing))
        weight.meta["val"] = torch.empty(rewritten.tensors[name].shape, dtype=value_of(weight).dtype, device="meta")
    return True


def _with_those_of(rewritten: GraphRewrite, product: Any, low: Any, up: Any) -> tuple[Any, Any]:
    """The operands of a branch in front of those that a product has already: an artifact's come before a LoRA's, which is added first."""
    before, other = (product.args[PLACES[name]] for name in ("low", "up"))
    if before is None:
        return low, up
    axis = 1 if product.target is kernels.conv2d.default else -1
    joined = [rewritten.graph.call_function(aten.cat.default, (parts, at)) for parts, at in (([low, before], axis), ([up, other], 1))]
    return joined[0], joined[1]


@dataclass(frozen=True)
class _Down:
    """A first product beside a quantizer.

    Attributes:
        node: The product [B, ..., rank].
        weight: Its matrix [rank, C]: of an artifact's branch a tensor, for what the quantizer reads; of a LoRA a node.
        scale: [B, rank], by which a LoRA's product is multiplied, else None.
        rank: Its columns.
    """

    node: fx.Node
    weight: Any
    scale: Any | None
    rank: int


def fuse_down(rewritten: GraphRewrite) -> None:
    """Compute the first products of branches in the quantizer of the same tokens: the artifact's and those of a LoRA side by side, layer by layer.

    Their ranks together are at most LARGEST_RANK, those past it stay products of torch. What a quantizer reads may be a pre-scale or a rotation of what an
    artifact's branch reads, whose matrix is then divided by the one and rotated by the other.
    """
    of_slots: dict[tuple[Any, ...], Any] = {}  # what multiplies the columns of a LoRA's products, by their order
    place = {node: number for number, node in enumerate(rewritten.graph.nodes)}
    for quantize in calls(rewritten.graph, QUANTIZE):
        value = quantize.args[0].meta.get("val")  # a view that the rewrite added has none
        if value is None or value.ndim not in (2, 3) or value.dtype != rewritten.dtype or not _is_whole(value.shape[-1]):
            continue
        taken, total = list[_Down](), 0
        for down in _beside(rewritten, quantize.args[0]):
            if total + down.rank <= LARGEST_RANK and all(place[user] > place[quantize] for user in down.node.users):
                taken.append(down)
                total += down.rank
        if taken:  # a layer's own neighbour each other, so that its epilogue reads one range of columns
            taken.sort(key=lambda down: (min(place[user] for user in down.node.users), down.scale is not None))
            _join(rewritten, quantize, taken, of_slots)
    rewritten.graph.eliminate_dead_code()


def _is_whole(channels: Any) -> bool:
    return isinstance(channels, int) and channels % OCTET == 0


def _beside(rewritten: GraphRewrite, x: Any) -> Iterator[_Down]:
    """The products with thin matrices, which epilogues add, of what a quantizer reads, or what that is a rotation or pre-scale of; an artifact's first."""
    lora = [down for down in _readers(rewritten, x) if down.scale is not None]
    read: list[tuple[Any, Callable[[Tensor], Tensor]]] = [(x, lambda matrix: matrix)]
    if (rotation := _rotation_before(rewritten, x)) is not None:
        x, block = rotation
        read.append((x, lambda matrix: rotate_weight(matrix, block)))
    if (pre_scale := _pre_scale_before(rewritten, x)) is not None:
        behind = read[-1][1]
        read.append((pre_scale[0], lambda matrix: behind(matrix / pre_scale[1])))
    for node, fold in read:
        for down in _readers(rewritten, node):
            if down.scale is None:
                matrix = fold(down.weight.float()).to(down.weight.dtype)
                if matrix.is_meta or bool(matrix.isfinite().all()):
                    yield replace(down, weight=matrix)
    yield from lora


def _readers(rewritten: GraphRewrite, x: Any) -> Iterator[_Down]:
    """The products of x with a thin matrix that an epilogue adds."""
    for node in x.users:
        if node.target not in (LINEAR, linear_low) or node.args[0] is not x or not _feeds_epilogues(node):
            continue
        name, scale = str(node.args[1].target), node.args[2] if node.target is linear_low else None
        if node.target is LINEAR and (name not in rewritten.tensors or (len(node.args) > 2 and node.args[2] is not None)):
            continue
        weight = node.args[1] if scale is not None else rewritten.tensors[name]
        rank = value_of(node.args[1]).shape[0]
        if rank % OCTET == 0 and rank <= LARGEST_RANK:
            yield _Down(node, weight, scale, rank)


def _feeds_epilogues(node: Any) -> bool:
    """Whether a value is only a branch's operand of layers, or a part of one."""
    return bool(node.users) and all(
        user.target is aten.cat.default or (user.target is kernels.linear.default and user.args[PLACES["low"]] is node)
        for user in node.users
    )


def _rotation_before(rewritten: GraphRewrite, x: Any) -> tuple[Any, int] | None:
    """(input, channels of a block) where x is a rotation of its input."""
    product = x.args[0] if x.target is aten.flatten.using_ints else x
    if not isinstance(product, fx.Node) or product.target is not aten.matmul.default:
        return None
    before, after, block = rotation_of(rewritten, product)
    return (before, block) if block and after is x else None


def _pre_scale_before(rewritten: GraphRewrite, x: Any) -> tuple[Any, Tensor] | None:
    """(input, float32 vector) where x is an input times a parameter's vector of the channels, as the graph multiplies by it."""
    if not isinstance(x, fx.Node) or x.target is not aten.mul.Tensor:
        return None
    for values, factor in (x.args, x.args[::-1]):
        source = factor.args[0] if isinstance(factor, fx.Node) and factor.target is aten.reshape.default else factor
        name = str(getattr(source, "target", ""))
        if isinstance(values, fx.Node) and name in rewritten.exact and rewritten.exact[name].shape[-1:] == value_of(x).shape[-1:]:
            return values, rewritten.tensors[name].float()
    return None


def _join(rewritten: GraphRewrite, quantize: Any, downs: list[_Down], of_slots: dict[tuple[Any, ...], Any]) -> None:
    """Replace a quantizer and products by one operator, whose second result has their columns side by side."""
    graph, at, ranges = rewritten.graph, 0, dict[Any, tuple[int, int]]()
    for down in downs:
        ranges[down.node] = at, at + down.rank
        at += down.rank
    with graph.inserting_before(quantize):
        weight, scale = _weight(rewritten, downs), _slot_scale(graph, downs, of_slots)
        both = graph.call_function(QUANTIZE_BRANCH, (*quantize.args, weight, scale, False, "none", *NO_NORM, 0, 0.0))
        codes, low = (graph.call_function(item_of, (both, index)) for index in (0, 1))

        def columns(start: int, end: int) -> Any:
            return low if (start, end) == (0, at) else graph.call_function(aten.slice.Tensor, (low, -1, start, end))

        joined = [user for down in downs for user in down.node.users if user.target is aten.cat.default]
        for cat in dict.fromkeys(joined):  # a layer's columns in one range need no concatenation
            operands: Any = cat.args[0]
            parts = [ranges.get(part, (-1, -1)) for part in operands]
            if all(end == start >= 0 for (_, end), (start, _) in itertools.pairwise(parts)):
                cat.replace_all_uses_with(columns(parts[0][0], parts[-1][1]))
                graph.erase_node(cat)
        for down in downs:
            if down.node.users:
                part = columns(*ranges[down.node])
                part.meta = dict(down.node.meta)
                down.node.replace_all_uses_with(part)
    replace_codes(rewritten, quantize, codes)


def _weight(rewritten: GraphRewrite, downs: list[_Down]) -> Any:
    """The matrices of products, one below the other: neighbouring tensors are joined now, what is an input in each call."""
    parts: list[Any] = []
    for is_lora, group in itertools.groupby(downs, lambda down: down.scale is not None):
        own = list(group)
        name = f"down.{own[0].node.name}"
        parts += (
            [down.weight for down in own] if is_lora else [rewritten.tensor(name, torch.cat([down.weight for down in own]).contiguous())]
        )
    return parts[0] if len(parts) == 1 else rewritten.graph.call_function(aten.cat.default, (parts,))


def _slot_scale(graph: fx.Graph, downs: list[_Down], of_slots: dict[tuple[Any, ...], Any]) -> Any | None:
    """[B, rank] by which the columns of products are multiplied: 1 for the artifact's. None where all are."""
    slots = next((down.scale for down in downs if down.scale is not None), None)
    if slots is None:
        return None
    key = tuple(down.rank if down.scale is None else down.scale for down in downs)
    if key not in of_slots:
        batch = graph.call_function(aten.sym_size.int, (slots, 0))
        parts = [graph.call_function(aten.new_ones.default, (slots, [batch, each])) if isinstance(each, int) else each for each in key]
        of_slots[key] = parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 1))
    return of_slots[key]
