"""Checkpointing of activations: those inside a block are not kept for the backward pass, but computed again in it.

Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174; torch.utils.checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from calibration.student.student import Student
from edm_deploy.errors import InputError

LISTS = ("resnets", "attentions", "transformer_blocks", "single_transformer_blocks")  # names of diffusers' lists of blocks


def checkpoint_activations(student: Student) -> None:
    """Compute the activations inside residual blocks, attentions and transformer blocks again in the backward pass; in place.

    A block quantizes its inputs itself, also those that other blocks read too, such as text embeddings: what it computes again must not depend on the others.

    Raises:
        InputError: The model has no such blocks.
    """
    blocks = outermost_blocks(student.model)
    if not blocks:
        raise InputError(
            f"--gradient-checkpointing: {student.family.class_name} has no blocks whose activations can be computed again. Leave it out."
        )
    for block in blocks:
        block.forward = _recomputed(block, student)


def outermost_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of diffusers' lists that are not inside another block."""
    found: list[nn.Module] = []
    for name, child in model.named_children():
        found += child if name in LISTS and isinstance(child, nn.ModuleList) else outermost_blocks(child)
    return found


def _recomputed(block: nn.Module, student: Student) -> Any:  # Any: a function of whatever a block takes and returns
    forward = block.forward

    def forget() -> None:
        for quantizer in student.quantizers.values():
            quantizer.clear_cache()

    def run(*args: Any, **kwargs: Any) -> Any:
        forget()
        result = forward(*args, **kwargs)
        forget()
        return result

    def call(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(run, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return call
