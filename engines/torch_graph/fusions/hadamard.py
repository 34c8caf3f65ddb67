"""Rotations of channels in front of a quantizer: the quantizer rotates what it reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from edm_deploy.network.rotation import hadamard
from engines.kernels.checks import LARGEST_ROTATION
from engines.torch_graph.fusions.prologues import ACTIVATION, BRANCH_PLACES, QUANTIZE_BRANCH, ROTATION, feeds_quantizers, quantizers
from engines.torch_graph.fx_helpers import aten, calls, value_of
from engines.torch_graph.rewrite import GraphRewrite

LOW_ROTATED = BRANCH_PLACES["low_rotated"]


def fuse_hadamard(rewritten: GraphRewrite) -> None:
    """Move a block Hadamard rotation of tokens whose result is only quantized into the quantizers, each of which rotates what it reads.

    Activations, norms and concatenations in front of it can follow it. Blocks of more than LARGEST_ROTATION channels stay products of torch.
    """
    for product in calls(rewritten.graph, aten.matmul.default):
        x, y, block = rotation_of(rewritten, product)
        if not 2 <= block <= LARGEST_ROTATION or value_of(x).ndim == 4 or value_of(x).dtype != rewritten.dtype or not feeds_quantizers(y):
            continue
        if any(quantize.args[ACTIVATION] != "none" or quantize.args[ROTATION] for quantize in quantizers(y)):
            continue
        for quantize in quantizers(y):
            quantize.args = (x, *quantize.args[1:ROTATION], block, *quantize.args[ROTATION + 1 :])
            if quantize.target is QUANTIZE_BRANCH:  # its branch reads what is rotated
                quantize.args = (*quantize.args[:LOW_ROTATED], True, *quantize.args[LOW_ROTATED + 1 :])
        y.replace_all_uses_with(x)  # the readers of its sizes
    rewritten.graph.eliminate_dead_code()


def rotation_of(rewritten: GraphRewrite, product: Any) -> tuple[Any, Any, int]:
    """(input, output, channels of a block) of the rotation that a product is, `network.rotation.rotate`; no channels where it is none."""
    x, y, matrix = product.args[0], product, product.args[1]
    if not (isinstance(matrix, fx.Node) and matrix.op == "get_attr" and str(matrix.target) in rewritten.tensors):
        return x, y, 0
    values = rewritten.tensors[str(matrix.target)]
    block = len(values) if values.ndim == 2 else 0
    if (
        block < 2
        or values.shape[1] != block
        or block & (block - 1)
        or values.is_meta
        or not torch.equal(values, hadamard(block, values.dtype, values.device))
    ):
        return x, y, 0
    if isinstance(x, fx.Node) and x.target is aten.unflatten.int:  # [..., C] as [..., C / block, block] and back
        back = next(iter(product.users))
        if len(product.users) != 1 or back.target is not aten.flatten.using_ints or back.args[1:] != (-2,):
            return x, y, 0
        x, y = x.args[0], back
    return x, y, block
