"""LayerNorm, RMSNorm and adaLN of tokens in front of a quantizer: one kernel for the norm, the per-sample scale and shift, and the rounding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from engines.kernels.operands import LARGEST_ROW
from engines.torch_graph.fusions.prologues import (
    ACTIVATION,
    NORM,
    QUANTIZE_BRANCH,
    ROTATION,
    feeds_quantizers,
    float32,
    quantizers,
    replace_codes,
)
from engines.torch_graph.fx_helpers import aten, calls, per_sample, value_of, vectors
from engines.torch_graph.rewrite import GraphRewrite, kernels

NORMS = (aten.layer_norm.default, aten.rms_norm.default)


@dataclass(frozen=True)
class _RowNorm:
    """A norm of the last axis, and its parameters as nodes."""

    x: Any
    gamma: fx.Node | None
    beta: fx.Node | None
    eps: float
    rms: bool


def fuse_row_norm(rewritten: GraphRewrite) -> None:
    """Move a norm of tokens whose result is only quantized into the quantizers, with adaLN's scale and shift where they follow.

    A norm that feeds several pairs of scale and shift, as SD3's dual attention has, is computed in the kernel of each.
    """
    for target in NORMS:
        for node in calls(rewritten.graph, target):
            norm = _row_norm(rewritten, node)
            if norm is None:
                continue
            for y, scale, shift in _ends(rewritten, node):
                if feeds_quantizers(y) and all(quantize.args[ACTIVATION] == "none" for quantize in quantizers(y)):
                    _norm_into(rewritten, y, norm, scale, shift)
    rewritten.graph.eliminate_dead_code()  # norms and products that nothing reads any more


def _row_norm(rewritten: GraphRewrite, node: Any) -> _RowNorm | None:
    """The norm of a node, where it is of the last axis of tokens, in the type between the sites, and its parameters are the model's own."""
    x, shape, *parameters = node.args
    rms = node.target is aten.rms_norm.default
    gamma, beta, eps = (*parameters, *[None] * 3)[:3]
    if rms:
        eps, beta = beta, None
    if (
        value_of(x).ndim == 4
        or value_of(x).dtype != rewritten.dtype
        or len(shape) != 1
        or not isinstance(shape[0], int)
        or shape[0] > LARGEST_ROW
    ):
        return None
    if any(parameter is not None and str(parameter.target) not in rewritten.exact for parameter in (gamma, beta)):
        return None
    if rms and eps is None:  # torch's default: the type's own
        return None
    return _RowNorm(x, gamma, beta, 1e-5 if eps is None else eps, rms)


def _ends(rewritten: GraphRewrite, norm: Any) -> list[tuple[Any, Any | None, Any | None]]:
    """(value, scale, shift): the norm itself, or each sum of a product with it, where it is read in no other way."""
    if feeds_quantizers(norm):
        return [(norm, None, None)]
    ends = []
    for product in [user for user in norm.users if user.target is aten.mul.Tensor and len(user.users) == 1]:
        scale = _scale(_other(product, norm), norm)
        add = next(iter(product.users))
        if scale is None or add.target is not aten.add.Tensor or add.kwargs:
            continue
        shift = per_sample(_other(add, product), norm)
        if shift is not None and all(value_of(column).dtype == rewritten.dtype for column in (scale, shift)):
            ends.append((add, scale, shift))
    return ends


def _other(node: Any, operand: Any) -> Any:
    """The other operand of a sum or product."""
    return node.args[1] if node.args[0] is operand else node.args[0]


def _scale(factor: Any, like: Any) -> Any | None:
    """The scale of a factor 1 + scale, where it is one vector for each sample; the addition may be before or behind the broadcast."""
    if per_sample(factor, like) is None:
        return None
    while factor.target is aten.unsqueeze.default:
        factor = factor.args[0]
    if factor.target is not aten.add.Tensor or factor.kwargs or factor.args[1] != 1:
        return None
    return factor.args[0]


def _norm_into(rewritten: GraphRewrite, y: Any, norm: _RowNorm, scale: Any | None, shift: Any | None) -> None:
    with rewritten.graph.inserting_before(y):
        columns = [None if column is None else vectors(rewritten.graph, column) for column in (scale, shift)]
        affine = [float32(rewritten, parameter) for parameter in (norm.gamma, norm.beta)]
    for quantize in quantizers(y):
        with rewritten.graph.inserting_before(quantize):
            if quantize.target is QUANTIZE_BRANCH:
                kind = "rms" if norm.rms else "layer"
                arguments = (norm.x, *quantize.args[1:NORM], kind, None, None, *affine, *columns, 0, norm.eps)
                fused = rewritten.graph.call_function(QUANTIZE_BRANCH, arguments)
            else:
                arguments = (norm.x, *affine, *columns, norm.eps, norm.rms, *quantize.args[1:ACTIVATION], quantize.args[ROTATION])
                fused = rewritten.graph.call_function(kernels.quantize_row_normed.default, arguments)
            replace_codes(rewritten, quantize, fused)
    y.replace_all_uses_with(norm.x)  # the readers of its sizes
