"""Load float weights from safetensors files into a model: one tensor at a time without a second copy, or memory-mapped without any copy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from edm_deploy.storage.variants import variant_of

WINDOW_BYTES = 256 << 20  # a file is mapped again after this many bytes, which releases the pages that were read
STEM = "diffusion_pytorch_model"
WIDENS = "_widens_while_running"  # attribute of the class of a model whose layers hold float32 weights while they run
INITS = frozenset(
    getattr(home, name) for home in (Tensor, nn.init) for name in dir(home) if name.endswith("_") and not name.startswith("_")
)


class _Empty(TorchFunctionMode):
    """Skip the initialization of parameters: memory that is never written is never committed. Buffers are computed as usual."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        filled = args[0] if args else (kwargs or {}).get("tensor")
        if func in INITS and isinstance(filled, nn.Parameter):
            return filled
        return func(*args, **(kwargs or {}))


def empty_model(build: Callable[[], nn.Module]) -> nn.Module:
    """The model of `build` in eval mode and without gradients; its parameters are uninitialized, its buffers are computed."""
    with _Empty():
        model = build()
    return model.eval().requires_grad_(False)


def load_weights(model: nn.Module, directory: Path, *, keep: bool = False) -> bool:
    """Fill a model from the safetensors files that diffusers wrote in `directory`.

    Args:
        model: From `empty_model`.
        directory: Holds `diffusion_pytorch_model.safetensors`, or an index and its shards; of one variant where there is no other.
        keep: Whether tensors stay mapped and in the dtype of the files, see `widen_while_running`; otherwise they become float32,
            convolutions channels_last.

    Returns:
        False, with the model unchanged, where names and shapes in the files are not exactly those of the model.

    Raises:
        OSError, ValueError: The files cannot be read.
    """
    try:
        return _filled(model, directory, keep)
    except (safetensors.SafetensorError, KeyError, RuntimeError) as err:
        raise ValueError(str(err)) from err


def _filled(model: nn.Module, directory: Path, keep: bool) -> bool:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    files = [directory / name for name in _files(directory)]
    found: dict[str, tuple[int, ...]] = {}
    for path in files:
        with safetensors.safe_open(path, framework="pt") as stream:
            found |= {name: tuple(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118  # not a dict
    if found != expected:
        return False
    for path in files:
        for name, value in _mapped(path) if keep else _read(path):
            _put(model, name, value)
    return True


def cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another floating-point type, in place; one that widens while it runs computes in `dtype` instead.

    The `to` of diffusers warns that some parts should stay in float32, even for models that name no such part.
    """
    _stop_widening(model)
    return nn.Module.to(model, dtype=dtype)


def widen_while_running(model: nn.Module) -> None:
    """Hold the parameters of each module in float32 only while it runs: the results are those of a float32 model."""
    for module in model.modules():
        if any(parameter.dtype != torch.float32 and parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(_widen)
            module.register_forward_hook(_narrow, always_call=True)
    # diffusers casts inputs to `dtype`, which would be that of the stored parameters.
    kind = type(model)
    model.__class__ = type(
        kind.__name__, (kind,), {"dtype": property(lambda _: torch.float32), "__module__": kind.__module__, WIDENS: True}
    )


def _stop_widening(model: nn.Module) -> None:
    """Undo `widen_while_running`."""
    if not vars(type(model)).get(WIDENS):
        return
    model.__class__ = type(model).__bases__[0]
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_widen, _narrow)]:
                del hooks[key]


def _widen(module: nn.Module, _: object) -> None:
    module.__dict__["_narrow"] = dict(module._parameters)
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.is_floating_point():
            module._parameters[name] = nn.Parameter(_float32(parameter.detach()), requires_grad=False)


def _narrow(module: nn.Module, *_: object) -> None:
    module._parameters.update(module.__dict__.pop("_narrow", {}))


def _float32(value: Tensor) -> Tensor:
    """A copy in float32, if it is floating point; channels_last: the layout that convolutions are fast in, on CPUs and GPUs alike."""
    layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
    return value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True, memory_format=layout)


def _files(directory: Path) -> list[str]:
    variant = variant_of(directory)
    index = directory / (f"{STEM}.safetensors.index.{variant}.json" if variant else f"{STEM}.safetensors.index.json")
    if not index.is_file():
        return [f"{STEM}.{variant}.safetensors" if variant else f"{STEM}.safetensors"]
    return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})


def _mapped(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as stream:
        for name in stream.keys():  # noqa: SIM118  # not a dict
            yield name, stream.get_tensor(name)


def _read(path: Path) -> Iterator[tuple[str, Tensor]]:
    with safetensors.safe_open(path, framework="pt") as stream:
        names = list(stream.keys())
    while names:
        left = WINDOW_BYTES
        with safetensors.safe_open(path, framework="pt") as stream:
            while names and left > 0:
                name = names.pop()
                value = stream.get_tensor(name)
                left -= value.nbytes
                yield name, _float32(value)
                del value


def _put(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if leaf in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)
