"""Fuse redundant memory-bound operations of a rewritten graph into adjacent kernels. Each fusion is one pass over the graph.

    x @ block Hadamard matrix -> quantize        a rotation of tokens' channels, by additions while quantizing
    cat of channels -> quantize                  each part is quantized, and codes are concatenated, an eighth of the bytes
    silu | gelu -> quantize                      the activation in float32 before rounding
    values * gelu(gates) -> quantize             GEGLU: both halves of a layer's output are read while quantizing
    layer_norm | rms_norm -> quantize            of tokens: one kernel normalizes and quantizes
    layer_norm * (1 + scale) + shift -> quantize adaLN, its scale and shift per sample: likewise
    group_norm -> quantize                       statistics in separate kernels, the rest while quantizing
    group_norm -> tokens of a map -> quantize    likewise: the map is quantized, and its codes are read as tokens
    x cos + rotated(x) sin, to float16           rotary position embedding of queries and keys: one kernel, the same result
    quantize(x), x down^T                        the first product of a low-rank branch, while quantizing
    conv2d | linear -> add low up^T              its second product: in the epilogue, before the next ones
    conv2d | linear -> add per-sample vector     a ResNet's time embedding: in the epilogue, in float32, as the next four
    conv2d | linear -> mul per-sample vector     the gate of a transformer
    conv2d | linear -> add                       a residual
    linear -> map of its tokens -> add           likewise: the other summand is read as tokens
    conv2d | linear -> clip                      to float16's finite values

A fused value is not rounded to float16 in between, so codes may differ from the unfused graph's where a value is close to a rounding tie.
"""

from __future__ import annotations

from engines.torch_graph.fusions.branches import fuse_down, fuse_up
from engines.torch_graph.fusions.epilogues import fuse_gate, fuse_residual, fuse_sample_bias, fuse_saturation
from engines.torch_graph.fusions.hadamard import fuse_hadamard
from engines.torch_graph.fusions.prologues import fuse_activation, fuse_concatenation, fuse_geglu, fuse_group_norm
from engines.torch_graph.fusions.rotary import fuse_rotary
from engines.torch_graph.fusions.row_norms import fuse_row_norm
from engines.torch_graph.rewrite import GraphRewrite


def fuse(rewritten: GraphRewrite, *, branches: bool = False) -> None:
    """Apply all fusions, in the order in which one enables the next.

    Args:
        rewritten: Changed in place.
        branches: Whether the kernels compute low-rank branches. Without it they are products of torch, added as the residual.
    """
    fuse_hadamard(rewritten)
    if branches:
        fuse_up(rewritten)
        fuse_down(rewritten)
        fuse_hadamard(rewritten)  # of the quantizers that branches read rotated values with
    fuse_concatenation(rewritten)
    fuse_geglu(rewritten)
    fuse_activation(rewritten)
    fuse_group_norm(rewritten)
    fuse_row_norm(rewritten)
    fuse_rotary(rewritten)
    fuse_sample_bias(rewritten)
    fuse_gate(rewritten)
    fuse_residual(rewritten)
    fuse_saturation(rewritten)
