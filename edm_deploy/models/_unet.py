"""What the UNet families share: building from a config, the 8-bit layers, and the forward signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from edm_deploy.errors import UnsupportedError
from edm_deploy.family import Config, Family, Rule

ENDS = Rule(r"^conv_(in|out)$", "keep8", "the first and last layer see the sample itself: their rounding is seen in it")
EMBEDDINGS = Rule(r"^(time|class|add)_embedding\.", "keep8", "few weights, and every block depends on their output")


class UNetFamily(Family):
    """A diffusers UNet. Sites: every Conv2d and Linear; first and last convolution, time and label embedding stay at W8A8.

    Source: EfficientDM, arXiv 2310.03270, section 5.1 (which layers stay at 8 bit).

    Attributes:
        model_class, output_class: Of diffusers, which ships no types.
        signature: The leading parameters of its `forward`, in order.
    """

    model_class: ClassVar[Any]
    output_class: ClassVar[Any]
    signature: ClassVar[tuple[str, ...]]
    rules = (ENDS, EMBEDDINGS)

    def build(self, config: Config) -> nn.Module:
        arguments = {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            model: nn.Module = self.model_class.from_config(arguments)
        except (TypeError, ValueError, KeyError, IndexError, ZeroDivisionError, AttributeError) as err:
            raise UnsupportedError(f"diffusers cannot build {self.class_name} from this config: {err}. Check config.json.") from err
        return model

    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        carried = [declared.name for declared in self.inputs(config)]
        return _bind_arguments(self.signature, carried, args, kwargs)

    def output(self, sample: Tensor) -> Any:
        return self.output_class(sample=sample)

    def size_multiple(self, config: Config) -> int:
        return int(2 ** (len(config["block_out_channels"]) - 1))  # every level but the last halves the map once

    def freeze_config(self, config: Config) -> Any:
        return FrozenDict(config)


def _bind_arguments(signature: tuple[str, ...], carried: Iterable[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    given = dict(zip(signature, args, strict=False)) | dict(kwargs)
    given = {name: value for name, value in given.items() if value is not None and name != "return_dict"}
    if unknown := sorted(set(given) - set(carried)):
        raise UnsupportedError(f"The engine has no input {unknown[0]!r}; it takes {', '.join(carried)}. Leave it out.")
    if missing := [name for name in carried if name not in given]:
        raise UnsupportedError(f"The engine needs {missing[0]!r}; pass it as the diffusers model would take it.")
    return given
