"""The common part of all families: construction from a config, the forward signature, the output class."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from edm_deploy.errors import EdmDeployError, InputError, UnsupportedError, first_line
from edm_deploy.network.family import Config, Family

REASONED = (ValueError, ArithmeticError, RuntimeError)  # of these the message is of the config; of others it is of Python's types
MAX_REASON = 200  # characters of an error of diffusers, some of which quote the whole config


class DiffusersFamily(Family):
    """A family whose model and output are classes of diffusers.

    Attributes:
        model_class, output_class: Classes of diffusers, which is untyped.
        signature: Parameters of the model's `forward`, in order.
        renamed: Graph input by parameter, where the names differ.
        refused: Reason by parameter, for parameters that have no input in the graph.
    """

    model_class: ClassVar[Any]
    output_class: ClassVar[Any]
    signature: ClassVar[tuple[str, ...]]
    renamed: ClassVar[Mapping[str, str]] = {}
    refused: ClassVar[Mapping[str, str]] = {}

    def build(self, config: Config) -> nn.Module:
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            model: nn.Module = self.model_class.from_config(arguments)
        except EdmDeployError:
            raise
        except Exception as err:  # diffusers and torch check few values of a config; each raises whatever it meets first
            reason = (
                first_line(err)[:MAX_REASON]
                if isinstance(err, REASONED)
                else "a field is missing, or has a type that the model does not take"
            )
            raise UnsupportedError(f"diffusers cannot build {self.class_name} from this config: {reason}. Check config.json.") from err
        return model

    def full_config(self, config: Config) -> dict[str, Any]:
        parameters = inspect.signature(self.model_class.__init__).parameters
        defaults = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
        full = defaults | {key: value for key, value in config.items() if not key.startswith("_")}
        as_json: dict[str, Any] = json.loads(json.dumps(full))
        return as_json

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        if len(args) > len(self.signature):
            raise InputError(
                f"{len(args)} positional arguments; {self.class_name} takes {len(self.signature)}: {', '.join(self.signature)}. Remove the others."
            )
        positional = dict(zip(self.signature, args, strict=False))
        if twice := sorted(set(positional) & set(kwargs)):
            raise InputError(f"{twice[0]!r} is passed twice, by position and by name; expected once. Remove one.")
        return positional | dict(kwargs)

    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        names = [declared.name for declared in self.inputs(config)]
        arguments = self.arguments(args, kwargs)
        for name, reason in self.refused.items():
            if _is_set(arguments.pop(name, None)):
                raise UnsupportedError(f"The engine has no input {name!r}: {reason}.")
        arguments = {
            self.renamed.get(name, name): value for name, value in arguments.items() if value is not None and name != "return_dict"
        }
        if unknown := sorted(set(arguments) - set(names)):
            raise UnsupportedError(f"The engine has no input {unknown[0]!r}; it takes {', '.join(names)}. Leave it out.")
        if missing := [name for name in names if name not in arguments]:
            raise UnsupportedError(f"The engine needs {missing[0]!r}; pass it as to the diffusers model.")
        return arguments

    def denoiser_class(self, base: type[nn.Module]) -> type[nn.Module]:
        return _with_model_mixin(base)  # type: ignore[arg-type]  # mypy finds no hash of a metaclass

    def output(self, sample: Tensor) -> Any:
        return self.output_class(sample=sample)

    def freeze_config(self, config: Config) -> Any:
        return FrozenDict(config)


@functools.cache
def _with_model_mixin(base: type[nn.Module]) -> type[nn.Module]:
    """`base` with the base class that `DiffusionPipeline.from_pretrained` demands of a denoiser. What both define is taken from `base`."""
    return type(base.__name__, (base, ModelMixin), {"__module__": base.__module__, "__doc__": base.__doc__})


def _is_set(value: Any) -> bool:
    """Whether an argument is set; pipelines pass None, False or an empty dict otherwise."""
    return isinstance(value, Tensor) or bool(value)
