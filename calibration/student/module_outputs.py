"""Capture the arguments and results of chosen modules in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


@contextmanager
def capture_outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the context every forward pass stores the last output tensor of each of these modules in the yielded dict, by name."""
    outputs: dict[str, Tensor] = {}

    def store(name: str) -> Any:
        return lambda module, args, output: outputs.__setitem__(name, tensors_of(output)[-1])

    with ExitStack() as stack:
        for name in names:
            handle = model.get_submodule(name).register_forward_hook(store(name))
            stack.callback(handle.remove)
        yield outputs


@contextmanager
def input_hooks(hooks: Iterable[tuple[nn.Module, Callable[..., None]]]) -> Iterator[None]:
    """Within the context each of these modules calls its hook with itself and its positional arguments before its forward pass.

    The arguments are those that the module is called with: before the rotation of a rotated layer's input.
    """
    with ExitStack() as stack:
        for module, hook in reversed(list(hooks)):  # prepended in this order, hooks of one module run in that of `hooks`
            stack.callback(module.register_forward_pre_hook(hook, prepend=True).remove)
        yield


def module_calls(network: nn.Module, inputs: Mapping[str, Tensor], names: Sequence[str], *, results: bool) -> list[Any]:
    """Run `network` until the last of some submodules is reached, and return their arguments or results.

    Args:
        network: Teacher or student; its submodules are those of its `model`.
        inputs: Graph inputs by name.
        names: Modules in the order in which they run, each exactly once per forward pass.
        results: Whether to return results; otherwise each entry is (args, kwargs).
    """
    captured: list[Any] = []

    def store(value: Any) -> None:
        captured.append(value)
        if len(captured) == len(names):
            raise _AllCaptured

    modules = [network.get_submodule(f"model.{name}") for name in names]
    if results:
        handles = [module.register_forward_hook(lambda _, args, output: store(output)) for module in modules]
    else:
        handles = [module.register_forward_pre_hook(lambda _, args, kwargs: store((args, kwargs)), with_kwargs=True) for module in modules]
    try:
        network(inputs)
    except _AllCaptured:
        return captured
    finally:
        for handle in handles:
            handle.remove()
    raise AssertionError("a block ran in the traced pass and not in this one")


def tensors_of(result: Any) -> list[Tensor]:
    """The tensors of a module's result."""
    return [leaf for leaf in tree_leaves(result) if leaf is not None]


class _AllCaptured(Exception):  # noqa: N818  # not an error: ends a forward pass early
    pass
