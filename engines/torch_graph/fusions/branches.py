"""Low-rank branches beside quantized layers: `y = layer(x) + (x down^T) up^T`, of an artifact or of a LoRA, in the kernels of the layer.

    linear(x, down) -> linear(., up) -> add      the second product in the layer's epilogue
    quantize(x), linear(x, down)                 the first product while x is quantized

Source: Li et al., SVDQuant, arXiv 2411.05007, section 4.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from edm_deploy.network.adapter_inputs import linear_low
from engines.kernels.launch import OCTET
from engines.kernels.quantize_branch import LARGEST_RANK
from engines.torch_graph.fusions.epilogues import PLACES, accepts, same_summands, with_operand
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
    if node.target is CONV2D and (
        tuple(value_of(weight).shape[2:]) != (1, 1) or any(_numbers(others[1:2], 1)) or any(_numbers(others[2:3], 0))
    ):
        return None
    rank = value_of(weight).shape[1]
    if rank % OCTET and not _fill_up(rewritten, low, weight, -rank % OCTET):
        return None
    if value_of(weight).ndim == 2:
        return low, weight
    with rewritten.graph.inserting_before(node):
        matrix = rewritten.graph.call_function(aten.flatten.using_ints, (weight, 1))
    matrix.meta["val"] = value_of(weight).flatten(1)
    return low, matrix


def _numbers(argument: Iterable[Any], usual: int) -> Iterator[bool]:
    """Whether each number of a convolution's stride or padding, which may be left out, differs from the usual one."""
    for numbers in argument:
        yield from (each != usual for each in (numbers if isinstance(numbers, list | tuple) else [numbers]))


def _fill_up(rewritten: GraphRewrite, low: Any, up: Any, missing: int) -> bool:
    """Add ranks of zeros to both weights of a branch, where they are parameters that nothing else reads."""
    down: Any = low.args[1] if isinstance(low, fx.Node) and low.target in (LINEAR, CONV2D) else None
    if not all(isinstance(each, fx.Node) and str(each.target) in rewritten.tensors and len(each.users) == 1 for each in (down, up)):
        return False
    if len(low.users) != 1 or (len(low.args) > 2 and low.args[2] is not None):
        return False
    for weight, axis in ((down, 0), (up, 1)):
        name, after = str(weight.target), [0] * (2 * (value_of(weight).ndim - 1 - axis))
        rewritten.tensors[name] = functional.pad(rewritten.tensors[name], (*after, 0, missing))
        weight.meta["val"] = torch.empty(rewritten.tensors[name].shape, dtype=value_of(weight).dtype, device="meta")
    return True


def _with_those_of(rewritten: GraphRewrite, product: Any, low: Any, up: Any) -> tuple[Any, Any]:
    """The operands of a branch behind those that a product has already."""
    before, other = (product.args[PLACES[name]] for name in ("low", "up"))
    if before is None:
        return low, up
    axis = 1 if product.target is kernels.conv2d.default else -1
    joined = [rewritten.graph.call_function(aten.cat.default, (parts, at)) for parts, at in (([before, low], axis), ([other, up], 1))]
    return joined[0], joined[1]


@dataclass(frozen=True)
class _Down:
    """A first product beside a quantizer.

    Attributes:
        node: The product [B, ..., rank].
        weight: Its matrix [rank, C].
        scale: [B, rank], by which a LoRA's product is multiplied, or None.
        rank: Its columns.
    """

    node: fx.Node
    weight: Any
    scale: Any | None
    rank: int


def fuse_down(rewritten: GraphRewrite) -> None:
    """Compute the first products of branches in the quantizer of the same tokens: the artifact's and those of a LoRA side by side.

    Their ranks together are at most LARGEST_RANK, those past it stay products of torch. An input that a quantizer reads times a vector of the channels, a
    pre-scale, is the branch's too, whose matrix is divided by the vector.
    """
    of_slots: dict[tuple[Any, ...], Any] = {}  # a LoRA's weights of its slots, side by side as often as layers share an input
    place = {node: number for number, node in enumerate(rewritten.graph.nodes)}
    for quantize in calls(rewritten.graph, QUANTIZE):
        x = quantize.args[0]
        value = x.meta.get("val")  # a cast that the rewrite added has none
        if value is None or value.ndim not in (2, 3) or value.dtype != rewritten.dtype or not _is_whole(value.shape[-1]):
            continue
        downs = list(_readers(rewritten, x))
        pre_scale = None if downs else _pre_scale_of(rewritten, x)
        if pre_scale is not None:
            downs = [down for down in _readers(rewritten, pre_scale[0]) if down.scale is None]
        taken = _taken([down for down in downs if all(place[user] > place[quantize] for user in down.node.users)])
        if taken:
            _join(rewritten, quantize, taken, None if pre_scale is None else pre_scale[1], of_slots)
    rewritten.graph.eliminate_dead_code()


def _is_whole(channels: Any) -> bool:
    return isinstance(channels, int) and channels % OCTET == 0


def _readers(rewritten: GraphRewrite, x: Any) -> Iterator[_Down]:
    """The products of x with a thin matrix that an epilogue adds."""
    for node in x.users:
        if node.target not in (LINEAR, linear_low) or node.args[0] is not x or not _feeds_epilogues(node):
            continue
        scale = node.args[2] if node.target is linear_low else None
        if node.target is LINEAR and (
            str(node.args[1].target) not in rewritten.tensors or (len(node.args) > 2 and node.args[2] is not None)
        ):
            continue
        rank = value_of(node.args[1]).shape[0]
        if rank % OCTET == 0 and rank <= LARGEST_RANK:
            yield _Down(node, node.args[1], scale, rank)


def _feeds_epilogues(node: Any) -> bool:
    """Whether a value is only a branch's operand of layers, or a part of one."""
    return bool(node.users) and all(
        user.target is aten.cat.default or (user.target in (kernels.linear.default,) and user.args[PLACES["low"]] is node)
        for user in node.users
    )


def _pre_scale_of(rewritten: GraphRewrite, x: Any) -> tuple[Any, Tensor] | None:
    """(input, vector) where x is an input times a parameter's vector of the channels."""
    if not isinstance(x, fx.Node) or x.target is not aten.mul.Tensor:
        return None
    for values, factor in (x.args, x.args[::-1]):
        source = factor.args[0] if isinstance(factor, fx.Node) and factor.target is aten.reshape.default else factor
        name = str(getattr(source, "target", ""))
        if isinstance(values, fx.Node) and name in rewritten.exact and rewritten.exact[name].shape[-1:] == value_of(x).shape[-1:]:
            return values, rewritten.exact[name]
    return None


def _taken(downs: list[_Down]) -> list[_Down]:
    """The first of the products whose ranks together have a kernel, those of the artifact before those of a LoRA."""
    taken: list[_Down] = []
    for down in sorted(downs, key=lambda down: down.scale is not None):
        if sum(each.rank for each in taken) + down.rank <= LARGEST_RANK:
            taken.append(down)
    return taken


def _join(
    rewritten: GraphRewrite, quantize: Any, downs: list[_Down], pre_scale: Tensor | None, of_slots: dict[tuple[Any, ...], Any]
) -> None:
    """Replace a quantizer and products by one operator, whose second result has their columns side by side."""
    graph = rewritten.graph
    with graph.inserting_before(quantize):
        weight, scale = _weight(rewritten, downs, pre_scale), _slot_scale(graph, downs, of_slots)
        arguments = (*quantize.args, weight, scale, False, "none", *NO_NORM, 0, 0.0)
        both = graph.call_function(QUANTIZE_BRANCH, arguments)
        codes, low = (graph.call_function(item_of, (both, index)) for index in (0, 1))
        at = 0
        for down in downs:
            part = low if len(downs) == 1 else graph.call_function(aten.slice.Tensor, (low, -1, at, at + down.rank))
            part.meta = dict(down.node.meta)
            at += down.rank
            down.node.replace_all_uses_with(part)
    replace_codes(rewritten, quantize, codes)
    rewritten.added.update((both, codes, low))


def _weight(rewritten: GraphRewrite, downs: list[_Down], pre_scale: Tensor | None) -> Any:
    """The matrices of products, one below the other: parameters are joined now, inputs in each call."""
    constant = [str(down.weight.target) for down in downs if down.scale is None]
    parts: list[Any] = []
    if constant:
        matrix = torch.cat([rewritten.tensors[name] for name in constant])
        if pre_scale is not None:
            matrix = (matrix.float() / pre_scale).to(matrix.dtype)
        parts.append(rewritten.tensor(f"down.{constant[0]}", matrix.contiguous()))
    parts += [down.weight for down in downs if down.scale is not None]
    return parts[0] if len(parts) == 1 else rewritten.graph.call_function(aten.cat.default, (parts,))


def _slot_scale(graph: fx.Graph, downs: list[_Down], of_slots: dict[tuple[Any, ...], Any]) -> Any | None:
    """[B, rank] by which the columns of products are multiplied: 1 for the artifact's. None where all are."""
    slots = next((down.scale for down in downs if down.scale is not None), None)
    if slots is None:
        return None
    constant = sum(down.rank for down in downs if down.scale is None)
    key = (constant, *(down.scale for down in downs if down.scale is not None))
    if key not in of_slots:
        parts = list(key[1:])
        if constant:
            batch = graph.call_function(aten.sym_size.int, (slots, 0))
            parts.insert(0, graph.call_function(aten.new_ones.default, (slots, [batch, constant])))
        of_slots[key] = parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, 1))
    return of_slots[key]
