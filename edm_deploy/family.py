"""What a model family must tell us, so that nothing else in the project knows a model's name: one subclass a file in `models/`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from edm_deploy import lookup, models
from edm_deploy.errors import UnsupportedError

Placement = Literal["quantize", "keep8", "float"]
Config = Mapping[str, Any]  # a diffusers config: its values are whatever the JSON holds
Kind = Literal["float", "float32", "int64"]


@dataclass(frozen=True)
class ModelInput:
    """One input of a denoiser's graph.

    Attributes:
        name: As in the diffusers forward signature.
        kind: `float` follows the graph's dtype; the others are fixed.
        dims: A number where the size is fixed, a name where it is dynamic; `batch` comes first, always.
    """

    name: str
    kind: Kind
    dims: tuple[str | int, ...]

    def dtype(self, float_dtype: torch.dtype) -> torch.dtype:
        """The torch dtype of this input in a graph whose floating-point type is `float_dtype`."""
        return {"float": float_dtype, "float32": torch.float32, "int64": torch.int64}[self.kind]


SAMPLE = "sample"
TIMESTEP = ModelInput("timestep", "float32", ("batch",))


class Family(ABC):
    """One architecture of diffusers. Stateless: the config comes with each call.

    Attributes:
        class_name: The diffusers class, as `_class_name` in its config.json.
        component: The denoiser's name in a pipeline, `unet` or `transformer`.
    """

    class_name: ClassVar[str]
    component: ClassVar[str] = "unet"

    @abstractmethod
    def build(self, config: Config) -> nn.Module:
        """The float model of this config with random weights, on the default device (`with torch.device("meta")` costs nothing).

        Raises:
            UnsupportedError: This config asks for something that the family cannot quantize; the message says what.
        """

    @abstractmethod
    def inputs(self, config: Config) -> tuple[ModelInput, ...]:
        """The graph's inputs in order; the first is `sample`, the second `timestep`."""

    @abstractmethod
    def placement(self, site: str) -> Placement:
        """What becomes of the Conv2d or Linear of this name: `quantize`, `keep8` (W8A8 symmetric) or `float`."""

    @abstractmethod
    def forward(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The prediction of `model`, [B, C, H, W], for inputs named as in `inputs`."""

    @abstractmethod
    def bind(self, config: Config, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of the diffusers model's own `forward`, as graph inputs by name.

        Raises:
            UnsupportedError: An argument that the graph does not carry is not None.
        """

    @abstractmethod
    def output(self, sample: Tensor) -> Any:  # each diffusers model has an output class of its own
        """The diffusers output object around a prediction."""

    @abstractmethod
    def size_multiple(self, config: Config) -> int:
        """Height and width must be multiples of this many pixels."""

    def random_conditioning(self, config: Config, batch: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Conditioning of `batch` samples drawn without data, one tensor for each input beyond sample and timestep."""
        return {}

    def freeze_config(self, config: Config) -> Any:  # diffusers' FrozenDict: attribute access, as pipelines expect
        """`config` as the mapping with attributes that diffusers pipelines read."""
        return dict(config)

    def sites(self, model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
        """Every layer that gets quantized, by its name in the model; the order is the model's own."""
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
        for name, layer in layers.items():
            if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
                raise UnsupportedError(f"Site {name!r} pads with {layer.padding_mode!r}; integer convolutions pad with zeros only.")
        return {name: layer for name, layer in layers.items() if self.placement(name) != "float"}

    def sample_shape(self, config: Config) -> tuple[int, int, int]:
        """Channels, height and width of one sample at the model's own size."""
        size = config["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(config["in_channels"]), int(height), int(width)


def family_named(name: str) -> Family:
    """The family in `models/<name>.py`; UnsupportedError lists the known ones otherwise."""
    family: Family = lookup.load(models, name, "FAMILY")
    return family


def name_of_family(class_name: str) -> str:
    """The name of the family that answers for a diffusers class.

    Raises:
        UnsupportedError: No family does; the message names the nearest and how to add one.
    """
    classes = {family_named(name).class_name: name for name in lookup.names(models)}
    if class_name not in classes:
        raise UnsupportedError(
            f"No model family answers for {class_name!r}.{lookup.suggestion(class_name, classes)} "
            f"Known: {', '.join(sorted(classes))}. To add one, write edm_deploy/models/<name>.py (CONTRIBUTING.md)."
        )
    return classes[class_name]


def skeleton(family: Family, config: Config) -> nn.Module:
    """The float model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return family.build(config).eval().requires_grad_(False)
