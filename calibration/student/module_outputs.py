"""Capture what chosen modules receive and return in a forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from calibration.student.student import Student
from calibration.student.teacher import Teacher


@contextmanager
def activations_unquantized(student: Student) -> Iterator[None]:
    """Within it the student's activations pass as they are."""
    quantizers = {name: layer.quantizer for name, layer in student.layers.items()}
    for layer in student.layers.values():
        layer.quantizer = None
    try:
        yield
    finally:
        for name, layer in student.layers.items():
            layer.quantizer = quantizers[name]


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of whatever a module returns."""
    return [leaf for leaf in tree_leaves(result) if leaf is not None]


class _Enough(Exception):  # noqa: N818  # no error: it ends a forward pass early
    pass


def _until_enough(network: Student | Teacher, part: Mapping[str, Tensor]) -> None:
    try:
        network(part)
    except _Enough:
        return
    raise AssertionError("a block ran in the traced pass and not in this one")


@contextmanager
def _watched(model: nn.Module, names: Sequence[str], *, before: bool) -> Iterator[list[Any]]:
    """What the modules are called with (`before`) or return, in their order; the pass ends with the last."""
    seen: list[Any] = []

    def look(value: Any) -> None:
        seen.append(value)
        if len(seen) == len(names):
            raise _Enough

    handles = [
        module.register_forward_pre_hook(lambda _, args, kwargs: look((args, kwargs)), with_kwargs=True)
        if before
        else module.register_forward_hook(lambda _, args, output: look(output))
        for module in map(model.get_submodule, names)
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
